"""The side of tensors that Python sees: devices, moves between them, and what refuses to leave a device."""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.simulated_cuda.dispatch import Watch, label
from tests.support.simulated_cuda.storages import (
    LOCAL,
    as_device,
    device_index,
    is_faking,
    is_plain,
    setting,
    state_of,
    unwatched,
)
from tests.support.simulated_cuda.streams import Stream, current_stream, use

REAL = types.SimpleNamespace()
"""What was replaced."""

_accumulators: dict[int, Stream] = {}
"""By parameter: the stream of an AccumulateGrad node that something holds."""


def replace_methods() -> None:
    """Let tensors go by their labels."""
    REAL.device, REAL.to = Tensor.__base__.device, Tensor.to
    REAL.numpy, REAL.array, REAL.deepcopy = Tensor.numpy, Tensor.__array__, Tensor.__deepcopy__
    REAL.run, REAL.grad = threading.Thread.run, torch.autograd.grad
    REAL.ddp = nn.parallel.DistributedDataParallel.__init__
    Tensor.device = property(_device)
    Tensor.is_cuda = property(lambda self: self.device.type == "cuda")
    Tensor.is_cpu = property(lambda self: self.device.type == "cpu")
    Tensor.get_device = lambda self: self.device.index if self.device.type == "cuda" else -1
    Tensor.to, Tensor.cuda, Tensor.cpu = _to, _cuda, _cpu
    Tensor.numpy, Tensor.__array__, Tensor.__deepcopy__ = _numpy, _array, _deepcopy
    Tensor.record_stream = _record_stream
    Tensor.pin_memory = lambda self, *_: self.clone()
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in (
        "is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype",
    ):  # fmt: skip
        setattr(torch, name, _as_on_cpu(getattr(torch, name)))
    torch.autocast.__init__ = _as_on_cpu(torch.autocast.__init__)
    torch.autograd.grad = _grad
    nn.parallel.DistributedDataParallel.__init__ = _ddp
    threading.Thread.run = _thread_run


def hold_accumulators(parameters: Any) -> list[Any]:
    """Hold AccumulateGrad nodes, made on the stream that is current now, as DDP does."""
    nodes = []
    for parameter in parameters:
        if (state := state_of(parameter)) is not None and parameter.requires_grad:
            _accumulators[id(parameter)] = current_stream(state.device)
            nodes.append(torch.autograd.graph.get_gradient_edge(parameter).node)
    return nodes


def _device(self: Tensor) -> torch.device:
    real = getattr(LOCAL, "real_devices", False)
    if not real and is_plain(self) and (index := device_index(self)) is not None:
        return torch.device("cuda", index) if index >= 0 else torch.device("cpu")
    return REAL.device.__get__(self)


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.is_meta or getattr(LOCAL, "unwatched", False):
        return REAL.to(self, *args, **kwargs)
    copy = kwargs.pop("copy", False)
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
    if other is not None:
        device, dtype, memory = other.device, other.dtype, None
    else:
        device, dtype, _, memory = torch._C._nn._parse_to(*args, **kwargs)
    target = self.device if device is None else as_device(device)
    if target.type == "meta":
        return REAL.to(self, device=target, dtype=dtype)
    options = {} if memory is None else {"memory_format": memory}
    if target == self.device:
        return REAL.to(self, dtype=dtype or self.dtype, copy=copy, **options)
    if not is_plain(self):  # a fake one
        return torch.ops.aten._to_copy(self, dtype=dtype, device=target, **options)
    if self.requires_grad and torch.is_grad_enabled():
        moved: Tensor = _Moved.apply(self, target, dtype or self.dtype, options)  # type: ignore[no-untyped-call]
        return moved
    return _copied(self, target, dtype or self.dtype, options)


def _copied(value: Tensor, target: torch.device, dtype: torch.dtype, options: Any) -> Tensor:
    """Copy between devices; between two of CUDA the current streams of both wait for each other, as PyTorch's do."""
    streams = [current_stream(d.index) for d in (value.device, target) if d.type == "cuda"]
    if len(streams) == 2:
        streams[0].wait_stream(streams[1])
        streams[1].wait_stream(streams[0])
    with setting("target", target):
        found: Tensor = REAL.to(value, dtype=dtype, copy=True, **options)
    if len(streams) == 2:
        streams[0].wait_stream(streams[1])
    return found


class _Moved(torch.autograd.Function):
    """A copy between devices whose gradient comes back: autograd's own takes both for the CPU."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, target: torch.device, dtype: torch.dtype, options: Any
    ) -> Tensor:
        ctx.home, ctx.dtype = value.device, value.dtype
        return _copied(value, target, dtype, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _to(gradient, ctx.home, ctx.dtype), None, None, None


def _cuda(self: Tensor, device: Any = None, **_: Any) -> Tensor:
    return _to(self, as_device("cuda" if device is None else device))


def _cpu(self: Tensor, **_: Any) -> Tensor:
    return _to(self, torch.device("cpu"))


def _numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    _refuse_numpy(self)
    return REAL.numpy(self, *args, **kwargs)


def _array(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    _refuse_numpy(self)
    return REAL.array(self, *args, **kwargs)


def _refuse_numpy(value: Tensor) -> None:
    if value.is_cuda:
        raise TypeError(
            f"can't convert {value.device} device type tensor to numpy. Use Tensor.cpu() first."
        )


def _deepcopy(self: Tensor, memo: Any) -> Tensor:
    index = device_index(self) if is_plain(self) else None
    with unwatched():
        copied = REAL.deepcopy(self, memo)
    if index is None or (state := state_of(self)) is None:
        return copied
    use(state, current_stream(index), False, "deepcopy")
    current_stream(index).advance()
    return label(copied, index, "deepcopy")


def _record_stream(self: Tensor, stream: Stream) -> None:
    if (state := state_of(self)) is not None:
        state.recorded.add(stream)


def _factory(function: Any) -> Any:
    @functools.wraps(function)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Tensor) and device is None:
            device = data.device
        if is_faking():
            return function(data, *args, device=device, **kwargs)
        target = None if device is None else as_device(device)
        with setting("factory", True):
            value = function(data, *args, **kwargs)
        if target is None or target == value.device:
            return value
        if target.type == "meta":
            return REAL.to(value, "meta")
        grad = value.requires_grad and value.is_leaf
        moved = _to(value.detach() if grad else value, target)
        return moved.requires_grad_() if grad else moved

    return made


def _as_on_cpu(function: Any) -> Any:
    """Let autocast of CUDA be that of the CPU."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if a == "cuda" else a for a in args)
        kwargs = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
        return function(*args, **kwargs)

    return called


def _thread_run(self: threading.Thread) -> None:
    with Watch():
        REAL.run(self)


def _ddp(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    REAL.ddp(self, module, *args, **kwargs)
    self._held = hold_accumulators(module.parameters())


def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    for value in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
        stream = _accumulators.get(id(value))
        capture = current_stream().capture
        if stream is not None and stream.default and capture is not None and capture.underway:
            capture.invalidate("an AccumulateGrad node of the default stream")
            raise RuntimeError(
                "an AccumulateGrad node that was made on the default stream takes part in a "
                "backward that is captured"
            )
    return REAL.grad(outputs, inputs, *args, **kwargs)
