"""Let the recurrences of a decoder that is traced be one opaque node each.

    with traced_recurrences(decoder):
        torch.export.export(decoder, ...)

The code of a layer's own forward runs; only the function that carries the state over the tokens, which it looks up by
its name, is ours for the time of the trace: a trace would hold as many steps as there were chunks of tokens.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.delta_rule import CHUNKED_RULE, STEPPED_RULE
from hidrop_fx.ops.recurrence import CAPTURED_RECURRENCE
from hidrop_fx.ops.selective_scan import MAMBA, MAMBA_2
from hidrop_fx.ops.state_space import CAPTURED_SCAN

_ABSENT = object()
# Arguments that say nothing about the result without a cache and packed rows, or only how it is computed.
_NEUTRAL = {
    *("initial_state", "output_final_state", "cu_seqlens", "use_cache", "output_attentions"),
    *("initial_states", "return_final_states", "return_last_state", "position_ids"),
    *("use_mambapy", "use_associative_scan"),
}


class _Known(NamedTuple):
    """Functions that a module's forward may run."""

    marked: str
    """Name of that which is a node while it is traced: the one of many tokens."""
    beside: str
    """Name of that of one token behind others."""
    marking: Callable[[str, str], Callable[..., Any]]
    """Makes what is called in its place, from the class that calls and the name of its module."""


def has_known_rule(module: nn.Module) -> bool:
    """Return True for a module whose forward runs a recurrence under names that are known."""
    return _known(module) is not None


@contextmanager
def traced_recurrences(decoder: nn.Module) -> Iterator[None]:
    """Let the layers of a decoder call their recurrences as one node, and undo it."""
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in decoder.modules():
            known = _known(module)
            if known is not None:
                values = vars(module)
                undo.append((values, values.get("forward", _ABSENT)))
                values["forward"] = _marking(module, known)
        yield
    finally:
        for values, before in undo:
            if before is _ABSENT:
                del values["forward"]
            else:
                values["forward"] = before


def _known(module: nn.Module) -> _Known | None:
    code = _code_of(module)
    names = set() if code is None else set(code.__code__.co_names)
    return next((known for known in _RULES if {known.marked, known.beside} <= names), None)


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


def _marking(module: nn.Module, known: _Known) -> Callable[..., Any]:
    """Return a module's forward in which the rule is a node."""
    code = _code_of(module)
    assert code is not None
    home = str(code.__globals__["__name__"])
    mark = known.marking(type(module).__name__, home)
    names = {**code.__globals__, known.marked: mark}
    made = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    made.__kwdefaults__ = code.__kwdefaults__
    return made.__get__(module)


def _refuse_unknown(caller: str, name: str, given: dict[str, Any]) -> None:
    unknown = {k for k, v in given.items() if k not in _NEUTRAL and v is not None}
    if unknown:
        raise CaptureError(
            f"{caller} calls {name} with {sorted(unknown)}, which hidrop_fx does not carry over"
        )


def _delta_rule(caller: str, home: str) -> Callable[..., Any]:
    def mark(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _refuse_unknown(caller, CHUNKED_RULE, kwargs)
        read = [each.transpose(1, 2) for each in (query, key, value)]
        out = CAPTURED_RECURRENCE(*read, g, beta, home, use_qk_l2norm_in_kernel)
        return out.transpose(1, 2).contiguous(), None

    return mark


def _mamba_2(caller: str, home: str) -> Callable[..., Any]:
    def mark(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        chunk_size: int,
        D: Tensor | None = None,  # noqa: N803
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        **kwargs: Any,
    ) -> Tensor:
        """As the module's own, what is added to the step and to what is read left outside of the node."""
        _refuse_unknown(caller, MAMBA_2.many, kwargs)
        step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        step = softplus(step) if dt_softplus else step
        low, high = dt_limit
        read = [each.transpose(1, 2) for each in (C, B, hidden_states)]
        bounds = float(low), None if high == math.inf else float(high)
        out = CAPTURED_SCAN(*read, step, A, home, chunk_size, *bounds).transpose(1, 2)
        out = out if D is None else out + D[:, None] * hidden_states.float()
        return out.contiguous()

    return mark


def _mamba(caller: str, home: str) -> Callable[..., Any]:
    def mark(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        D: Tensor | None = None,  # noqa: N803
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As the module's own: channels [B, C, S], steps [B, C, S], what is written and read [B, N, S]."""
        _refuse_unknown(caller, MAMBA.many, kwargs)
        step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        step = softplus(step) if delta_softplus else step
        read = [each.transpose(1, 2).unsqueeze(1) for each in (C, B, hidden_states)]
        out = CAPTURED_SCAN(*read, step.transpose(1, 2), A, home, 0, 0.0, None)
        out = out.squeeze(1).transpose(1, 2)
        out = out if D is None else out + hidden_states * D[:, None]
        return out if z is None else out * silu(z)

    return mark


_RULES = (
    _Known(CHUNKED_RULE, STEPPED_RULE, _delta_rule),
    _Known(*MAMBA_2, _mamba_2),
    _Known(*MAMBA, _mamba),
)
