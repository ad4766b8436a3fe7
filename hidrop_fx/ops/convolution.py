"""Short causal convolutions over tokens, each channel for itself, as one node each.

    y[t] = sum(weight[:, k] * x[t - K + 1 + k] for k in range(K)) + bias       # zeros before the first token

While a decoder is captured each is the opaque operator `hidrop::convolution`, as its attentions are
`hidrop::attention`; a pass puts in its place

    causal_convolution(x, ...)                                        # pads last, so no mask is needed
    cached_convolution(x, keys, values, slots, mask, ...)             # decode
    convolution_over(x, extended(keys, ...), extended(values, ...), mask, ...)   # with gradients

A layer's cache holds what its convolution read of the last K - 1 tokens of the prompt and of all behind it, one half of
the channels as its "keys" and the other as its "values": a window of K tokens over a cache, in which a row's tokens are
found as in attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx


@torch.library.custom_op("hidrop::convolution", mutates_args=())
def captured_convolution(
    states: Tensor, keys: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Mark a decoder layer's convolution in a captured graph: [B, 1, S, D], its halves, [D, 1, K], [D] -> [B, 1, S, D]."""
    raise RuntimeError(
        "hidrop::convolution marks a convolution in a captured graph and has no kernel; run the "
        "`attention` or `kv_cache` pass before the graph"
    )


@captured_convolution.register_fake
def _(states: Tensor, keys: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(states.shape)


CAPTURED_CONVOLUTION = torch.ops.hidrop.convolution.default


class ConvolutionArguments(NamedTuple):
    """Arguments of a captured convolution."""

    states: fx.Node
    keys: fx.Node
    values: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node) -> "ConvolutionArguments":
        """Return the arguments of a captured convolution."""
        return cls(*node.args)  # type: ignore[arg-type]


def causal_convolution(
    states: Tensor, keys: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Convolve the tokens of each row [B, 1, S, D] with those before them.

    Args:
        keys, values: the halves of `states`, which `kv_cache` finds here.
        weight: [D, 1, K].
    """
    tokens = states.shape[2]
    channels = states[:, 0].transpose(1, 2).to(weight.dtype)
    out = F.conv1d(channels, weight, bias, padding=weight.shape[2] - 1, groups=weight.shape[0])
    return out[:, :, :tokens].transpose(1, 2)[:, None].to(states.dtype)


def cached_convolution(
    states: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Write the halves of the new tokens into the filled part of a layer's buffers, convolve over it.

    `keys` and `values` are [B, 1, filled, D / 2] views whose last places, `slots` [q], belong to the new
    tokens. `mask` is a boolean [B, 1, q, filled], or None when every row has all of them and q is 1.
    """
    keys.index_copy_(2, slots, key.to(keys.dtype))
    values.index_copy_(2, slots, value.to(values.dtype))
    return convolution_over(states, keys, values, mask, weight, bias)


def convolution_over(
    states: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Convolve new tokens [B, 1, q, D] over all that a cache holds, their own halves included; -> [B, 1, q, D]."""
    batch, _, tokens, _ = states.shape
    places = _latest(mask, keys, weight.shape[2])
    taken = places.clamp(min=0).expand(batch, tokens, -1).flatten(1)[:, :, None]
    halves = [part[:, 0].gather(1, taken.expand(-1, -1, part.shape[3])) for part in (keys, values)]
    window = torch.cat(halves, dim=2).unflatten(1, (tokens, weight.shape[2])).float()
    window = window.masked_fill((places < 0)[..., None], 0)
    out = (window * weight[:, 0].t().float()).sum(dim=2)
    if bias is not None:
        out = out + bias.float()
    return out[:, None].to(states.dtype)


def last_places(columns: Tensor, is_vision: Tensor, slots: Tensor) -> Tensor:
    """Return the places [B, n] of the last tokens of each row of a segment [B, S], in order; negative in front of its first.

    Args:
        is_vision: a table [B, L + 1], whose length tells real tokens from padding.
        slots: arange(n).
    """
    real = columns < is_vision.shape[1] - 1
    return real.sum(dim=1, keepdim=True) - slots.shape[0] + slots


def columns_of_places(columns: Tensor, is_vision: Tensor, places: Tensor) -> Tensor:
    """Return the columns [B, n] of the tokens at `places`, the sentinel where they are negative."""
    found = columns.gather(1, places.clamp(min=0))
    return torch.where(places < 0, is_vision.shape[1] - 1, found)


def take_places(states: Tensor, places: Tensor) -> Tensor:
    """Gather halves [B, 1, S, d] at the places [B, n]; the first token's where they are negative."""
    rows = places.clamp(min=0)[:, None, :, None]
    return states.gather(2, rows.expand(-1, -1, -1, states.shape[3]))


def _latest(mask: Tensor | None, keys: Tensor, width: int) -> Tensor:
    """Return the places of the last `width` tokens that each new one sees, in order, -1 for none: [B or 1, q, width]."""
    filled = keys.shape[2]
    if mask is None:
        steps = torch.arange(width, device=keys.device) + (filled - width)
        return steps.clamp(min=-1)[None, None]
    numbers = torch.arange(1, filled + 1, device=keys.device)
    seen = F.pad(mask[:, 0] * numbers, (width, 0))
    return seen.topk(width, dim=-1).values.flip(-1) - 1
