"""Weights that are tensor subclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Halves(Tensor):
    """A tensor kept as half of itself; knows linear layers alone."""

    half: Tensor

    @staticmethod
    def __new__(cls, half: Tensor) -> Halves:
        made: Halves = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, half.shape, dtype=half.dtype, device=half.device
        )
        made.half = half
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, *size: Any) -> Halves:
        return Halves(parts["half"])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].half * 2, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].half)
        raise NotImplementedError(f"{func} of Halves")
