"""The gated delta rule, by which a layer carries one state a row from token to token in the place of attention.

    state = exp(decay[t]) * state
    state = state + key[t] x (write[t] * (value[t] - key[t] @ state))
    out[t] = query[t] @ state

While a decoder is captured it is the opaque operator `hidrop::recurrence`, as its attentions are `hidrop::attention`; a
pass puts in its place

    causal_recurrence(q, k, v, ...)                                   # pads last, where none reads the state behind them
    prompt_recurrence(q, k, v, ..., columns, is_vision)               # and the state behind each row's last token
    cached_recurrence(q, k, v, ..., state, order, counts)             # decode
    recurrence_over(q, k, v, ..., state, order, counts)               # with gradients

The arithmetic is that of the functions in the layer's own module: `hidrop_fx.ops.delta_rule`.

A layer's cache holds no tokens: the state fp32 [B, H, d, e], as its "values", and what the short convolution in front
read of the last K tokens [B, 1, K, C], as its "keys".
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hidrop_fx.ops.delta_rule import DELTA_RULE


@torch.library.custom_op("hidrop::recurrence", mutates_args=())
def captured_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
) -> Tensor:
    """Mark a decoder layer's recurrence in a captured graph: ..., [B, H, S, e], ... -> [B, H, S, e].

    Args:
        query, key: [B, G, S, d].
        value: [B, H, S, e].
        decay: logarithm of what stays of the state, at most 0, [B, S, H].
        write: share of a value's error that is written, [B, S, H].
        home: name of the module that holds the functions.
        normalised: queries and keys are scaled to a length of 1.
    """
    raise RuntimeError(
        "hidrop::recurrence marks a recurrence in a captured graph and has no kernel; run the "
        "`attention` or `kv_cache` pass before the graph"
    )


@captured_recurrence.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
) -> Tensor:
    return query.new_empty(value.shape)


CAPTURED_RECURRENCE = torch.ops.hidrop.recurrence.default


def causal_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
) -> Tensor:
    """Run the tokens of each row from an empty state; -> [B, H, S, e]."""
    return _run(query, key, value, decay, write, None, home, normalised)[0]


def prompt_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
    columns: Tensor,
    is_vision: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the tokens of each row from an empty state, which padding behind them leaves as it is.

    Args:
        columns: [B, S], the sentinel for padding.
        is_vision: a table [B, L + 1], whose length tells real tokens from padding.

    Returns:
        [B, H, S, e], and the state fp32 [B, H, d, e] behind each row's last token.
    """
    real = (columns < is_vision.shape[1] - 1)[:, :, None]
    decay, write = decay.masked_fill(~real, 0), write.masked_fill(~real, 0)
    return _run(query, key, value, decay, write, None, home, normalised)


def last_inputs(states: Tensor, columns: Tensor, is_vision: Tensor, width: int) -> Tensor:
    """Return what a convolution read of the last `width` tokens of each row [B, 1, S, C], zero in front of its first.

    Args:
        columns: [B, S], the sentinel for padding.
        is_vision: a table [B, L + 1], whose length tells real tokens from padding.
    """
    count = (columns < is_vision.shape[1] - 1).sum(dim=1, keepdim=True)
    places = count - width + torch.arange(width, device=columns.device)
    rows = places.clamp(min=0)[:, None, :, None].expand(-1, -1, -1, states.shape[3])
    return states.gather(2, rows).masked_fill((places < 0)[:, None, :, None], 0)


def recurrence_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
    state: Tensor,
    order: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run new tokens behind a state, which those that are padding leave as it is.

    Args:
        state: [B, H, d, e].
        order: places [B, q] of a row's real tokens, in order, then of the others; None if all are real.
        counts: how many are real, [B].

    Returns:
        [B, H, q, e], and the state behind each row's last token.
    """
    if order is None or counts is None:
        return _run(query, key, value, decay, write, state, home, normalised)
    tokens = query.shape[2]
    moved = not statically_known_true(tokens == 1)
    if moved:
        query, key, value = (taken(each, order, 2) for each in (query, key, value))
        decay, write = (taken(each, order, 1) for each in (decay, write))
    real = torch.arange(tokens, device=order.device) < counts[:, None]
    decay, write = (each.masked_fill(~real[:, :, None], 0) for each in (decay, write))
    out, state = _run(query, key, value, decay, write, state, home, normalised)
    return (put_back(out, order, 2) if moved else out), state


def cached_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    home: str,
    normalised: bool,
    state: Tensor,
    order: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """Run new tokens behind a state [B, H, d, e], and write what it becomes in its place; -> [B, H, q, e]."""
    given = (query, key, value, decay, write, home, normalised)
    out, after = recurrence_over(*given, state, order, counts)
    state.copy_(after)
    return out


def convolution_behind(
    states: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Convolve new tokens [B, 1, q, C] with those before them.

    Args:
        inputs: what was read of the last K tokens, [B, 1, K, C].
        weight: [C, 1, K].
        order: places [B, q] of a row's real tokens, in order, then of the others; None if all are real.
        counts: how many are real, [B].

    Returns:
        [B, 1, q, C], and what was read of the last K tokens, [B, 1, K, C].
    """
    tokens, width = states.shape[2], inputs.shape[2]
    moved = order is not None and not statically_known_true(tokens == 1)
    read = taken(states, order, 2) if moved and order is not None else states
    window = torch.cat([inputs, read.to(inputs.dtype)], dim=2)
    channels = window[:, 0].transpose(1, 2).to(weight.dtype)
    out = F.conv1d(channels, weight, bias, groups=weight.shape[0])[:, :, 1:]
    out = out.transpose(1, 2)[:, None].to(states.dtype)
    if counts is None:
        return out, window[:, :, tokens:]
    places = counts[:, None] + torch.arange(width, device=counts.device)
    after = taken(window, places, 2)
    return (put_back(out, order, 2) if moved and order is not None else out), after


def cached_convolution_behind(
    states: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """Convolve new tokens with those before them, and write the last K in their place `inputs`; -> [B, 1, q, C]."""
    out, after = convolution_behind(states, inputs, weight, bias, order, counts)
    inputs.copy_(after)
    return out


def taken(states: Tensor, places: Tensor, dim: int) -> Tensor:
    """Gather tokens at the places [B, n] of a dimension; the first is the batch."""
    return states.gather(dim, _index(states, places, dim))


def put_back(states: Tensor, places: Tensor, dim: int) -> Tensor:
    """Put tokens to the places [B, n] of a dimension that they were taken from."""
    return torch.empty_like(states).scatter(dim, _index(states, places, dim), states)


def _index(states: Tensor, places: Tensor, dim: int) -> Tensor:
    shape = [len(places), *[1] * (states.dim() - 1)]
    shape[dim] = places.shape[1]
    wanted = [-1 if d in (0, dim) else size for d, size in enumerate(states.shape)]
    return places.reshape(shape).expand(wanted)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    read = [each.transpose(1, 2) for each in (query, key, value)]
    out, after = DELTA_RULE(*read, decay, write, state, home, normalised)
    return out.transpose(1, 2), after
