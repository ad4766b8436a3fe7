"""Load a vision-language model with its processor, from a directory or the Hub.

model, processor = load_model("llava-hf/llava-1.5-7b-hf", device="cuda", dtype="bfloat16")
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from hidrop_fx.errors import HidropError

DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
# Raised by transformers for a model that cannot be loaded.
_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError)


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, in eval mode, and its processor.

    Args:
        name: a directory, or an id on the Hub.
        device: a torch device; None takes the GPU if there is one.
        dtype: one of `DTYPES`; "auto" takes the dtype of the checkpoint.
        attention: `attn_implementation` of transformers.

    Raises:
        HidropError: no such model, device, dtype or attention.
    """
    target = _device(device)
    if dtype not in DTYPES:
        raise HidropError(f"dtype={dtype!r}; use one of {', '.join(DTYPES)}")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention
        )
    except _LOADING_ERRORS as error:
        raise _loading_error(name, error) from error
    return model.to(target).eval(), processor


def load_config(name: str | Path) -> Any:
    """Load the config of a model, no weights.

    Raises:
        HidropError: no such model.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise _loading_error(name, error) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HidropError(f"device={name!r} cannot be used: {reason}") from error
    return device


def _loading_error(name: str | Path, error: Exception) -> HidropError:
    name = str(name)
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return HidropError(f"cannot load {name}: no such directory")
    return HidropError(f"cannot load {name}: {' '.join(str(error).split())}")
