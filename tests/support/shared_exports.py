"""Export decoders that are built alike once in a test session: a graph holds names of parameters, and no values.

with exports_shared():
    hidrop.compile(tiny_llava(), schedule)(**inputs)      # exports, or takes the graph of an equal decoder

Two decoders are built alike if all that export could see is equal: classes, configurations, attributes, the kinds of their
parameters and buffers, and the functions that are called. Decoders of other code than transformers' and torch's, with hooks
or with functions of their own are exported each for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from hidrop_fx.capture import export as export_module

_EXPORT = torch.export.export
_OWN = ("torch.nn.", "transformers.")
_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_CODE = (type, FunctionType, BuiltinFunctionType)
_EMPTY = (
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
_BY_NAME = {InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER}
_EXPORTS: dict[Hashable, Any] = {}


class _UnlikeError(Exception):
    """The decoder holds something that cannot be compared."""


@contextmanager
def exports_shared() -> Iterator[None]:
    """Let equal decoders share one export, and the others have their own."""
    original = export_module._export

    def export(decoder: Any, layer_types: tuple[str, ...], axes: int, code: Any) -> Any:
        try:
            key = (_built(decoder), layer_types, axes)
        except _UnlikeError:
            return original(decoder, layer_types, axes, code)
        if torch.export.export is not _EXPORT:  # a test's own
            return original(decoder, layer_types, axes, code)
        if key not in _EXPORTS:
            found = original(decoder, layer_types, axes, code)
            kinds = {spec.kind for spec in found.graph_signature.input_specs}
            if code.custom_backwards or code.ends_gradients or kinds - _BY_NAME:
                return found
            _EXPORTS[key] = found
        return _EXPORTS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "_export", export)
        yield


def _built(decoder: nn.Module) -> Hashable:
    homes = {sys.modules[type(module).__module__] for module in decoder.modules()}
    tensors = (*decoder.named_parameters(remove_duplicate=False), *decoder.named_buffers())
    return (
        tuple((path, _module(module)) for path, module in decoder.named_modules()),
        tuple((name, _kind(tensor)) for name, tensor in tensors),
        frozenset((home.__name__, _code(vars(home))) for home in homes),
        torch.get_default_dtype(),
    )


def _module(module: nn.Module) -> Hashable:
    kind = type(module)
    if not kind.__module__.startswith(_OWN) or any(vars(module).get(name) for name in _EMPTY):
        raise _UnlikeError
    names = {"_parameters", "_buffers", "_modules", *_EMPTY}
    own = {name: value for name, value in vars(module).items() if name not in names}
    return kind, _code(vars(kind)), tuple((name, _value(own[name])) for name in sorted(own))


def _code(names: Mapping[str, Any]) -> Hashable:
    """Return the functions and classes of a module or class, by name."""
    return frozenset((name, value) for name, value in names.items() if isinstance(value, _CODE))


def _kind(tensor: Tensor) -> Hashable:
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout is not torch.strided:
        raise _UnlikeError
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return type(tensor), shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _value(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_value, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_value, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_value(name), _value(each)) for name, each in value.items())
    if hasattr(value, "to_json_string"):
        private = {n: v for n, v in vars(value).items() if n[0] == "_" and isinstance(v, _PLAIN)}
        return type(value), value.to_json_string(use_diff=False), _value(private)
    if isinstance(value, type) or getattr(value, "__qualname__", None):
        if hasattr(value, "__self__") or getattr(value, "__closure__", None):
            raise _UnlikeError
        return value
    raise _UnlikeError
