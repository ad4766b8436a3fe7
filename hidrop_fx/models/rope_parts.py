"""The dimensions that RoPE turns by each axis of a decoder's position ids, and their parts for tokens of several ids.

    [t0 t1 | h0 h1 h2 h3 | w0 w1 w2 w3], copies = 2  ->  parts [0 1 | 0 0 1 1 | 0 0 1 1], twice

Which axis a dimension belongs to is asked of the decoder's own rotary embedding, whatever the order that it has them in.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.layers import rotation, text_decoder
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.methods.reducers import Reduction
from hidrop_fx.models.family import Family
from hidrop_fx.surroundings import neutral_surroundings

_axes: "weakref.WeakKeyDictionary[nn.Module, list[int]]" = weakref.WeakKeyDictionary()


def check_copies(model: Any, family: Family, reduction: Reduction) -> None:
    """Check that a token of the model can bear as many position ids as a reducer gives it.

    Raises:
        UnsupportedModelError: its position ids have one axis.
        ScheduleError: the dimensions of an axis cannot be divided so.
    """
    if family.axes == 1:
        raise UnsupportedModelError(
            f"before={reduction} gives merged tokens the time, height and width of their members, and the position ids of "
            f"{type(model).__name__} have one axis: it is for models with M-RoPE, such as Qwen2.5-VL. Use a reducer "
            "without position ids of its own, such as visionzip"
        )
    axes = _axes_of(text_decoder(model), family.axes)
    sections = [axes.count(axis) for axis in range(family.axes)]
    if any(section % reduction.copies for section in sections):
        largest = math.gcd(*sections)
        fitting = [str(k) for k in range(1, largest + 1) if largest % k == 0]
        raise ScheduleError(
            f"copies={reduction.copies} does not divide the dimensions that RoPE turns by each axis, {sections} in "
            f"{type(model).__name__}: use copies={' or '.join(fitting)}"
        )


def rope_parts(decoder: Any, axes: int, copies: int) -> Tensor:
    """Return the part of its axis that each dimension of cos and sin is in, int64 [d] on the host."""
    known = _axes_of(decoder, axes)
    seen = [0] * axes
    parts = []
    for axis in known:
        parts.append(seen[axis] * copies // known.count(axis))
        seen[axis] += 1
    return torch.tensor(parts * 2, device="cpu")


def _axes_of(decoder: Any, axes: int) -> list[int]:
    """Return the axis that turns each of the pairs of dimensions, [d / 2]."""
    rope = decoder.rotary_emb
    if rope not in _axes:
        _axes[rope] = _asked(decoder, axes)
    return _axes[rope]


@torch.no_grad()
def _asked(decoder: Any, axes: int) -> list[int]:
    with neutral_surroundings():
        table = next((b for b in decoder.rotary_emb.buffers()), torch.empty(0))
        states = torch.zeros(1, 1, 1, device=table.device)
        ids = torch.eye(axes, dtype=torch.int64, device=table.device)[:, None]  # one token an axis
        tables = rotation(decoder, states, ids, 0)
    turned = [] if tables is None else (tables[1][0] != 0).T.tolist()
    found = [[axis for axis in range(axes) if of[axis]] for of in turned]
    half = len(found) // 2
    if not half or any(len(each) != 1 for each in found) or found[:half] != found[half:]:
        raise UnsupportedModelError(
            f"the rotary embedding of {type(decoder).__name__} does not turn each pair of dimensions by one axis, so that a "
            "token cannot bear several position ids"
        )
    return [each[0] for each in found[:half]]
