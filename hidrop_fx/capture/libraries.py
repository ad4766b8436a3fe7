"""Whose code a decoder runs: that of libraries which it is made of, or the user's own."""

import sys
from typing import Any

from hidrop_fx.capture.hooks import function_of

_LIBRARIES = sys.stdlib_module_names | {
    *("torch", "numpy", "transformers", "peft", "accelerate", "torchao", "deepspeed", "hidrop_fx"),
    "passes",
}


def is_foreign(function: Any) -> bool:
    """Return True for a callable whose code is not that of a library that a decoder is made of."""
    found = function_of(function)
    home = getattr(found, "__globals__", None)
    if home is not None:
        return is_foreign_home(str(home.get("__name__", "")))
    return is_foreign_home(getattr(type(found), "__module__", ""))


def is_foreign_home(module: str) -> bool:
    """Return True for the name of a module that is none of theirs."""
    return module.partition(".")[0] not in _LIBRARIES
