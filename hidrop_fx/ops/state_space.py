"""Selective state spaces, as in Mamba and Mamba-2: one state a row from token to token in the place of attention.

    state = exp(step[t] * rates) * state + step[t] * value[t] x key[t]
    out[t] = state @ query[t]

While a decoder is captured it is the opaque operator `hidrop::state_space`; a pass puts in its place

    causal_scan(q, k, v, ...)                                         # pads last, where none reads the state behind them
    prompt_scan(q, k, v, ..., columns, is_vision)                     # and the state behind each row's last token
    cached_scan(q, k, v, ..., state, order, counts)                   # decode
    scan_over(q, k, v, ..., state, order, counts)                     # with gradients

The arithmetic is that of the functions in the layer's own module: `hidrop_fx.ops.selective_scan`. A layer keeps what
one with a gated delta rule keeps (`hidrop_fx.ops.recurrence`), its state [B, H, P, N].
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hidrop_fx.ops.recurrence import put_back, taken
from hidrop_fx.ops.selective_scan import SELECTIVE_SCAN


@torch.library.custom_op("hidrop::state_space", mutates_args=())
def captured_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
) -> Tensor:
    """Mark a decoder layer's state space in a captured graph: ..., [B, H, S, P], ... -> fp32 [B, H, S, P].

    Args:
        query, key: [B, G, S, N].
        value: [B, H, S, P].
        step: [B, S, H], or [B, S, P] where `rates` are [P, N].
        rates: at most 0, [H] or [P, N].
        home: name of the module that holds the functions.
        chunk: tokens of a chunk; 0 where there are none.
        low, high: bounds of `step`, which one token behind others does not know.
    """
    raise RuntimeError(
        "hidrop::state_space marks a recurrence in a captured graph and has no kernel; run the "
        "`attention` or `kv_cache` pass before the graph"
    )


@captured_scan.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
) -> Tensor:
    return value.new_empty(value.shape, dtype=torch.float32)


CAPTURED_SCAN = torch.ops.hidrop.state_space.default


def causal_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
) -> Tensor:
    """Run the tokens of each row from an empty state; -> fp32 [B, H, S, P]."""
    return _run(query, key, value, _bounded(step, low, high), rates, None, home, chunk)[0]


def prompt_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
    columns: Tensor,
    is_vision: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the tokens of each row from an empty state, which padding behind them leaves as it is.

    Args:
        columns: [B, S], the sentinel for padding.
        is_vision: a table [B, L + 1], whose length tells real tokens from padding.

    Returns:
        fp32 [B, H, S, P], and the state fp32 [B, H, P, N] behind each row's last token.
    """
    real = (columns < is_vision.shape[1] - 1)[:, :, None]
    step = _bounded(step, low, high).masked_fill(~real, 0)
    return _run(query, key, value, step, rates, None, home, chunk)


def scan_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
    state: Tensor,
    order: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run new tokens behind a state, which those that are padding leave as it is.

    Args:
        state: [B, H, P, N].
        order: places [B, q] of a row's real tokens, in order, then of the others; None if all are real.
        counts: how many are real, [B].

    Returns:
        fp32 [B, H, q, P], and the state behind each row's last token.
    """
    tokens = query.shape[2]
    one = statically_known_true(tokens == 1)
    if not one:
        step = _bounded(step, low, high)
    if order is None or counts is None:
        return _run(query, key, value, step, rates, state, home, chunk)
    if not one:
        query, key, value = (taken(each, order, 2) for each in (query, key, value))
        step = taken(step, order, 1)
    real = torch.arange(tokens, device=order.device) < counts[:, None]
    step = step.masked_fill(~real[:, :, None], 0)
    out, state = _run(query, key, value, step, rates, state, home, chunk)
    return (out if one else put_back(out, order, 2)), state


def cached_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    home: str,
    chunk: int,
    low: float,
    high: float | None,
    state: Tensor,
    order: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """Run new tokens behind a state [B, H, P, N], and write what it becomes in its place; -> fp32 [B, H, q, P]."""
    given = (query, key, value, step, rates, home, chunk, low, high)
    out, after = scan_over(*given, state, order, counts)
    state.copy_(after)
    return out


def _bounded(step: Tensor, low: float, high: float | None) -> Tensor:
    # Steps are softplus of something: 0 bounds nothing.
    return step if low <= 0 and high is None else step.clamp(min=low, max=high)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    read = [each.transpose(1, 2) for each in (query, key, value)]
    out, after = SELECTIVE_SCAN(*read, step, rates, state, home, chunk)
    return out.transpose(1, 2), after
