"""What the layers of a decoder compute for each token, where some do not attend: states of a recurrence, MLPs alone.

    layer_kinds(text_config)[0]       # LayerKind(attends=False, weights=..., steps=..., ...)

Such a layer's work grows with the tokens and not with their square, and its cache is as large whatever the prompt.
"""

from dataclasses import dataclass
from typing import Any

from hidrop_fx.ops.mixers import HYBRID, RECURRENT

_MLP, _EXPERTS = "mlp", "moe"
_GATED, _PLAIN = 3, 2
_GATED_ATTENTION = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Models whose queries are projected beside a gate of their width."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One layer of a decoder, as costs see it."""

    attends: bool = True
    """It has an attention, beside a recurrence or alone."""
    mlp: int = _GATED
    """Matrices of its MLP: three where it is gated, two where it is not, none."""
    weights: int = 0
    """Numbers in the projections and the convolution of its recurrence, and in a gate of its attention: as many
    multiply-adds a token."""
    steps: int = 0
    """Multiply-adds of the recurrence itself for a token, as it is written for one token after another."""
    kept: int = 0
    """Numbers of a row that its cache holds in the dtype of the model: the last inputs of the convolution."""
    state: int = 0
    """Numbers of a row that its cache holds in 32 bits."""


ATTENDING = LayerKind()
"""Attention and a gated MLP."""


def layer_kinds(text: Any) -> tuple[LayerKind, ...]:
    """Return the kind of each layer of a text config; empty where all attend, or convolve."""
    types = tuple(getattr(text, "layer_types", None) or ())
    if not {RECURRENT, HYBRID, _MLP, _EXPERTS} & set(types):
        return ()
    recurrence: dict[str, Any] = _recurrence(text) if {RECURRENT, HYBRID} & set(types) else {}
    alone = bool(
        {_MLP, _EXPERTS} & set(types)
    )  # a layer has a mixer or an MLP, and this is not gated
    kinds = {
        RECURRENT: LayerKind(attends=False, mlp=0 if alone else _GATED, **recurrence),
        HYBRID: LayerKind(**recurrence),
        **dict.fromkeys((_MLP, _EXPERTS), LayerKind(attends=False, mlp=_PLAIN)),
    }
    gate = 0
    if getattr(text, "model_type", None) in _GATED_ATTENTION:
        gate = text.hidden_size * text.num_attention_heads * text.head_dim
    other = LayerKind(mlp=0 if alone else _GATED, weights=gate)
    return tuple(kinds.get(name, other) for name in types)


def _recurrence(text: Any) -> dict[str, Any]:
    if getattr(text, "linear_num_value_heads", None):
        return _delta_rule(text)
    if getattr(text, "mamba_num_heads", None) or getattr(text, "mamba_n_heads", None):
        return _mamba_2(text)
    return _mamba(text)


def _delta_rule(text: Any) -> dict[str, int]:
    """Count a gated delta net: queries, keys and values, a gate as wide as these, decay and share of each head.

    A token's step decays the state, reads it by the key, writes the error, and reads it by the query.
    """
    heads, hidden = text.linear_num_value_heads, text.hidden_size
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = heads * text.linear_value_head_dim
    convolved = (2 * keys + values) * text.linear_conv_kernel_dim
    state = values * text.linear_key_head_dim
    return {
        "weights": hidden * (2 * keys + 3 * values + 2 * heads) + convolved,
        "steps": 4 * state,
        "kept": convolved,
        "state": state,
    }


def _mamba_2(text: Any) -> dict[str, int]:
    """Count Mamba-2: values and a gate as wide, what is written and read by group, a step of each head.

    A token's step decays the state, writes, and reads.
    """
    heads = _first(text, "mamba_num_heads", "mamba_n_heads")
    width = heads * _first(text, "mamba_head_dim", "mamba_d_head")
    size = _first(text, "ssm_state_size", "mamba_d_state")
    groups = _first(text, "n_groups", "mamba_n_groups") * size
    convolved = (width + 2 * groups) * _first(text, "conv_kernel", "mamba_d_conv")
    into = 2 * width + 2 * groups + heads
    return {
        "weights": text.hidden_size * (into + width) + convolved,
        "steps": 3 * width * size,
        "kept": convolved,
        "state": width * size,
    }


def _mamba(text: Any) -> dict[str, int]:
    """Count Mamba: values and a gate as wide, what is written and read, and a step of each channel by its rank."""
    hidden, rank, size = text.hidden_size, text.mamba_dt_rank, text.mamba_d_state
    width = text.mamba_expand * hidden
    convolved = width * text.mamba_d_conv
    return {
        "weights": 3 * hidden * width + width * (rank + 2 * size) + rank * width + convolved,
        "steps": 3 * width * size,
        "kept": convolved,
        "state": width * size,
    }


def _first(text: Any, *names: str) -> int:
    found: int = next(v for v in (getattr(text, n, None) for n in names) if v is not None)
    return found
