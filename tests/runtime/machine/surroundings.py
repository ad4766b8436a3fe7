"""Global state of the process that no call may leave changed."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from typing import Any

import torch
from torch.nn.modules import module as modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx.lowering.checkpointing import _RECOMPUTE
from hidrop_fx.runtime.hf.replaced import _NOTED


def surroundings() -> dict[str, Any]:
    """Return modes, defaults, hooks and registries as they are now, by name."""
    logger = logging.getLogger("hidrop_fx")
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "threads": torch.get_num_threads(),
        "collector": gc.isenabled(),
        "profiler": sys.getprofile(),
        "warnings": list(warnings.filters),
        "logger": (logger.level, list(logger.handlers)),
        "global hooks": (
            len(modules._global_forward_hooks),
            len(modules._global_forward_pre_hooks),
            len(modules._global_backward_hooks),
        ),
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "labels": _NOTED.get()[0],
        "recompute": _RECOMPUTE.get(),
    }
