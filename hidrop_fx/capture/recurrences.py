"""Let the recurrences of a decoder that is traced be one opaque node each.

    with traced_recurrences(decoder):
        torch.export.export(decoder, ...)

The code of a layer's own forward runs; only the function that carries the state over the tokens, which it looks up by
its name, is ours for the time of the trace: a trace would hold as many steps as there were chunks of tokens.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.delta_rule import CHUNKED_RULE, STEPPED_RULE
from hidrop_fx.ops.recurrence import CAPTURED_RECURRENCE

_ABSENT = object()
# Arguments that say nothing about the result without a cache and packed rows.
_NEUTRAL = {"initial_state", "output_final_state", "cu_seqlens", "use_cache", "output_attentions"}


def has_known_rule(module: nn.Module) -> bool:
    """Return True for a module whose forward runs the gated delta rule under the names that are known."""
    code = _code_of(module)
    return code is not None and {CHUNKED_RULE, STEPPED_RULE} <= set(code.__code__.co_names)


@contextmanager
def traced_recurrences(decoder: nn.Module) -> Iterator[None]:
    """Let the layers of a decoder call the gated delta rule as one node, and undo it."""
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in decoder.modules():
            if has_known_rule(module):
                values = vars(module)
                undo.append((values, values.get("forward", _ABSENT)))
                values["forward"] = _marking(module)
        yield
    finally:
        for values, before in undo:
            if before is _ABSENT:
                del values["forward"]
            else:
                values["forward"] = before


def _code_of(module: nn.Module) -> FunctionType | None:
    """Return the function that a module's forward is, beneath what transformers and accelerate put around it.

    They move parameters there, and compute nothing.
    """
    own = vars(module).get("_old_forward") or vars(module).get("forward") or type(module).forward
    found = inspect.unwrap(getattr(own, "__func__", own), stop=lambda f: not _moves_alone(f))
    return found if isinstance(found, FunctionType) else None


def _moves_alone(function: Any) -> bool:
    names = getattr(function, "__globals__", None) or {}
    return str(names.get("__name__", "")).startswith(("transformers.integrations.", "accelerate."))


def _marking(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward in which the rule is a node."""
    code = _code_of(module)
    assert code is not None
    home = str(code.__globals__["__name__"])

    def mark(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        unknown = {k for k, v in kwargs.items() if k not in _NEUTRAL and v is not None}
        if unknown:
            raise CaptureError(
                f"{type(module).__name__} calls {CHUNKED_RULE} with {sorted(unknown)}, which hidrop_fx does not carry over"
            )
        read = [each.transpose(1, 2) for each in (query, key, value)]
        out = CAPTURED_RECURRENCE(*read, g, beta, home, use_qk_l2norm_in_kernel)
        return out.transpose(1, 2).contiguous(), None

    names = {**code.__globals__, CHUNKED_RULE: mark}
    made = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    made.__kwdefaults__ = code.__kwdefaults__
    return made.__get__(module)
