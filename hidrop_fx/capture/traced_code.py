"""Watch what a decoder's Python code does while it is traced, beside the operators that a graph records.

    with TracedCode(decoder) as code:
        torch.export.export(decoder, ...)
    code.custom_backwards           # of torch.autograd.Function: a graph has the forward alone
    code.ends_gradients             # modules that compute under torch.no_grad

A graph is traced without gradients, so that neither can be seen in it.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from hidrop_fx.errors import CaptureError

# Their backward is the derivative of their forward, written out to keep less.
_TRUE_DERIVATIVES = frozenset(("HadaWeight", "HadaWeightCP", "UniqueBaseGrad"))
# Its functions compute again what they were given to; the calls themselves say if layers are recomputed.
_RECOMPUTING = ("torch.utils.checkpoint",)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SPARSE = frozenset(
    (
        *("sparse_coo_tensor", "sparse_csr_tensor", "sparse_csc_tensor", "sparse_bsr_tensor"),
        *("sparse_compressed_tensor", "to_sparse", "to_sparse_csr"),
    )
)
_VALUE = frozenset(("__bool__", "__int__", "__float__", "__index__", "item", "tolist"))
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
# Frames between an operator and the `forward` of the function that it belongs to.
_FRAMES = 40


class TracedCode(TorchFunctionMode):
    """Names of what a graph would leave out, by the module that does it.

    Attributes:
        custom_backwards: names of the functions, with the module that calls each.
        ends_gradients: modules, as "layers.0.mlp (Block)".
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.custom_backwards: dict[str, str] = {}
        self.ends_gradients: dict[str, None] = {}
        self._reads_value = ""
        self._paths = {id(module): path for path, module in decoder.named_modules()}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if function == _DATA:
            return args[
                0
            ].detach()  # `.data` passes by the tracer, which would take it for a constant
        if function is torch._C._set_grad_enabled:
            if args and not args[0]:
                self._note_no_grad()
        elif name in _SPARSE:
            raise CaptureError(
                f"{self.module_at(sys._getframe(1))} builds a sparse tensor ({name}), whose pattern "
                "a graph with symbolic sizes cannot hold; merge such an adapter (merge_and_unload), or leave it out"
            )
        else:
            if name in _VALUE:
                self._reads_value = self.module_at(sys._getframe(1))
            self._note_custom_backward()
        return function(*args, **(kwargs or {}))

    def _note_custom_backward(self) -> None:
        for frame in _frames(sys._getframe(2)):
            if frame.f_code is _APPLY:
                function = frame.f_locals["cls"]
                name, home = function.__name__, function.__module__
                if name not in _TRUE_DERIVATIVES and home not in _RECOMPUTING:
                    self.custom_backwards.setdefault(name, self.module_at(frame))
                return
            if frame.f_code.co_name == "forward" and isinstance(_first_argument(frame), nn.Module):
                return

    def _note_no_grad(self) -> None:
        around = (f for f in _frames(sys._getframe(2)) if _home(f) == "torch.autograd.grad_mode")
        frame = next(around, None)
        while frame is not None and _home(frame) == "torch.autograd.grad_mode":
            if (
                frame.f_code.co_name == "__exit__"
            ):  # to the mode that it found, without gradients here
                return
            frame = frame.f_back
        home = "torch" if frame is None else _home(frame)
        if frame is not None and home == "torch.utils._contextlib":  # of a decorator
            module = next(iter(frame.f_locals.get("args", ())), None)
            if not isinstance(module, nn.Module):
                module = _module_in(frame)
        elif home.partition(".")[0] == "torch":
            return
        else:
            module = _module_in(frame)
        # transformers' rotary embeddings compute without gradients, from position ids alone.
        if isinstance(module, nn.Module) and not type(module).__module__.startswith(
            "transformers."
        ):
            self.ends_gradients.setdefault(self.module_at(frame))

    def module_at(self, frame: FrameType | None) -> str:
        """Name the innermost module of the decoder whose forward a frame runs in."""
        module = _module_in(frame, self._paths)
        if module is None:
            return "the decoder"
        kind = type(module)
        path = self._paths[id(module)] or "the decoder"
        return f"{path} ({kind.__module__}.{kind.__qualname__})"

    def module_of(self, error: BaseException) -> str:
        """Name the innermost module of the decoder whose forward raised an error."""
        if self._reads_value and isinstance(error, GuardOnDataDependentSymNode):
            return self._reads_value  # its trace ends outside the model
        trace, found = error.__traceback__, "the decoder"
        while trace is not None:
            module = _first_argument(trace.tb_frame)
            if isinstance(module, nn.Module) and id(module) in self._paths:
                found = self.module_at(trace.tb_frame)
            trace = trace.tb_next
        return found


def _module_in(frame: FrameType | None, known: Any = None) -> nn.Module | None:
    for found in _frames(frame, 200):
        first = _first_argument(found)
        if isinstance(first, nn.Module) and (known is None or id(first) in known):
            return first
    return None


def _home(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _frames(frame: FrameType | None, count: int = _FRAMES) -> Iterator[FrameType]:
    while frame is not None and count:
        yield frame
        frame, count = frame.f_back, count - 1
