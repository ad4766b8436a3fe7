"""Costs as a table beside those of the untouched model, and as plain JSON types."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hidrop_fx.planning.costs import Costs


def as_dict(costs: Costs) -> dict[str, Any]:
    """Return plan, sample and costs as plain JSON types."""
    return {
        "schedule": costs.schedule.to_dict(),
        "geometry": asdict(costs.geometry) | {"kinds": [*map(asdict, costs.geometry.kinds)]},
        "text_tokens": costs.text_tokens,
        "total_vision_tokens": costs.total_vision_tokens,
        "images": costs.images,
        "units": costs.sample.units,
        "batch_size": costs.batch_size,
        "new_tokens": costs.new_tokens,
        "segments": [asdict(segment) for segment in costs.segments],
        "vision_tokens": list(costs.vision_tokens),
        "tokens": list(costs.tokens),
        **_figures(costs),
        "token_layer_ratio": costs.token_layer_ratio,
        "identity": _figures(costs.identity),
        **({} if costs.scale_out is None else {"scale_out": costs.scale_out.to_dict()}),
    }


def table(costs: Costs) -> str:
    """Write the sample, the runs of layers, and each figure beside that of the untouched model."""
    g = costs.geometry
    lines = [
        f"schedule  {costs.schedule}",
        f"model     {g.num_layers} layers, hidden {g.hidden_size}, MLP {g.intermediate_size}, "
        f"{g.num_attention_heads} heads ({g.num_key_value_heads} key-value) of {g.head_dim}",
        f"sample    {costs.text_tokens} text + {costs.total_vision_tokens} vision tokens, "
        f"{costs.images} image{'' if costs.images == 1 else 's'}{_units(costs)}; batch {costs.batch_size}, "
        f"{costs.new_tokens} new tokens",
        "",
        f"{'layers':>8}  {'event':<6}  {'vision':>7}  {'tokens':>7}",
    ]
    for s in costs.segments:
        total = costs.text_tokens + s.vision_tokens
        lines.append(f"{s.layers:>8}  {s.reason:<6}  {s.vision_tokens:>7}  {total:>7}")
    if costs.schedule.reads is not None:
        layers = ", ".join(map(str, costs.schedule.reads))
        tokens = costs.entering_vision_tokens
        lines.append(f"text reads {tokens} frozen vision tokens at layer {layers}")
    lines += ["", *_ratios(costs)]
    if costs.scale_out is not None:
        lines += ["", str(costs.scale_out)]
    return "\n".join(lines)


def _ratios(costs: Costs) -> list[str]:
    lines = [f"{'':<28}  {'plan':>10}  {'identity':>10}  {'ratio':>7}"]
    ours, theirs = _figures(costs), _figures(costs.identity)
    for label, key, unit, digits in (
        ("vision tokens per layer", "average_vision_tokens", 1, 1),
        ("token-layers", "token_layers", 1, 0),
        ("vision TFLOPs (papers')", "vision_flops", 1e12, 3),
        ("prefill TFLOPs", "flops", 1e12, 3),
        ("KV cache MiB", "kv_bytes", 2**20, 1),
    ):
        ratio = f"{theirs[key] / ours[key]:.2f}x" if ours[key] else "-"
        left, right = (f"{found[key] / unit:.{digits}f}" for found in (ours, theirs))
        lines.append(f"{label:<28}  {left:>10}  {right:>10}  {ratio:>7}")
    return lines


def _figures(costs: Costs) -> dict[str, float]:
    return {
        "average_vision_tokens": costs.average_vision_tokens,
        "token_layers": sum(costs.tokens),
        "vision_flops": costs.vision_flops,
        "flops": costs.flops,
        "kv_bytes": costs.kv_bytes,
    }


def _units(costs: Costs) -> str:
    """Say what an int keep counts, where it is not images."""
    per, units = costs.schedule.per, costs.sample.units
    if per == "item":
        return ""
    if per == "sample":
        return ", kept per sample"
    return f", kept per {per}, {costs.images if units is None else units} of them"
