"""Versions of what takes part, for dumps and bug reports."""

import platform

import torch
import transformers

from hidrop_fx.version import __version__


def versions() -> dict[str, str]:
    """Return the versions of this package, torch, transformers, Python, the platform and CUDA."""
    return {
        "hidrop_fx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cuda": str(torch.version.cuda),
    }
