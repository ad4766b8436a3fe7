"""Choose inject, exit and filter layers from the measurements, with reasons.

    inject   the latest local minimum of the vision similarity that the injection sweep allows
    exit     the first layer from which on the exit sweep stays at its plateau
    filters  layers where most ILVAS curves, over K and n, have a local maximum

A sweep allows a layer where its damage is within `tolerance` of the worst damage of both sweeps, which is
about that of no vision at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hidrop_fx.analysis.measuring.attention_similarity import IlvasCurve
from hidrop_fx.analysis.measuring.sweeps import Sweep

MOST_FILTERS = 4
_NO_DAMAGE = (
    "these samples decide nothing: no layer does any damage without vision. They do not need their "
    "images, or the full model is wrong about all of them (then leave labels out, to compare by KL)"
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Layers that the measurements speak for, and the reasons."""

    inject: int
    exit: int
    filters: tuple[int, ...]
    """Best first: most ILVAS curves agree on it."""
    votes: tuple[float, ...]
    """By layer: share of the ILVAS curves known there with a local maximum at it."""
    reasons: tuple[str, ...]
    """One sentence a step."""


def choose(
    vision_similarity: Sequence[float | None],
    ilvas: Sequence[IlvasCurve],
    exits: Sweep,
    injections: Sweep,
    *,
    tolerance: float,
) -> Choice:
    """Choose the layers; every rule falls back on the sweeps, which always decide."""
    num_layers = len(vision_similarity)
    worst = max(*exits.damage, *injections.damage)
    allowed = max(tolerance * worst, 0.0)
    unit = "accuracy" if exits.accuracy is not None else "nats of KL"
    limit = f"{allowed:.3g} {unit} ({tolerance:.0%} of the worst, {worst:.3g})"
    last = _latest_allowed(injections, allowed)
    inject, why_inject = _inject(vision_similarity, last, limit)
    exit_layer, why_exit = _exit(exits, allowed, inject, num_layers, limit)
    votes = filter_votes(ilvas, num_layers)
    filters, why_filters = _filters(votes, inject, exit_layer)
    return Choice(
        inject=inject,
        exit=exit_layer,
        filters=filters,
        votes=votes,
        reasons=(*((_NO_DAMAGE,) if worst <= 0 else ()), why_inject, why_exit, why_filters),
    )


def local_minima(curve: Sequence[float | None]) -> list[int]:
    """Find inner layers lower than both neighbours; of a flat bottom the first."""
    known = [(k, -v) for k, v in enumerate(curve) if v is not None]
    return _peaks(known, ends=False)


def filter_votes(ilvas: Sequence[IlvasCurve], num_layers: int) -> tuple[float, ...]:
    """Compute, by layer, the share of the curves known there that have a local maximum at it."""
    hits, known = [0] * num_layers, [0] * num_layers
    for curve in ilvas:
        points = [(k, v) for k, v in enumerate(curve.values) if v is not None]
        for layer, _ in points:
            known[layer] += 1
        for layer in _peaks(points, ends=False):
            hits[layer] += 1
    return tuple(hit / total if total else 0.0 for hit, total in zip(hits, known, strict=True))


def _peaks(points: list[tuple[int, float]], *, ends: bool) -> list[int]:
    found = []
    for i, (layer, value) in enumerate(points):
        before = points[i - 1][1] if i else None
        later = next((v for _, v in points[i + 1 :] if v != value), None)
        if (before is None or later is None) and not ends:
            continue
        if (before is None or value > before) and (later is None or value > later):
            found.append(layer)
    return found


def _latest_allowed(injections: Sweep, allowed: float) -> int:
    """Return the last layer before the damage first leaves the tolerance."""
    last = 0
    for layer, damage in zip(injections.layers, injections.damage, strict=True):
        if damage > allowed:
            break
        last = layer
    return last


def _inject(similarity: Sequence[float | None], last: int, limit: str) -> tuple[int, str]:
    minima = [layer for layer in local_minima(similarity) if layer <= last]
    if minima:
        return minima[-1], (
            f"inject at layer {minima[-1]}: there the vision tokens' similarity has a local minimum, "
            f"fusion begins; injecting as late as layer {last} stays within {limit}"
        )
    return last, (
        f"inject at layer {last}: no local minimum of the vision tokens' similarity lies where injecting "
        f"stays within {limit}, so the injection sweep alone decides"
    )


def _exit(
    exits: Sweep, allowed: float, inject: int, num_layers: int, limit: str
) -> tuple[int, str]:
    chosen = num_layers
    for layer, damage in zip(reversed(exits.layers), reversed(exits.damage), strict=True):
        if damage > allowed or layer <= inject:
            break
        chosen = layer
    if chosen == num_layers:
        return chosen, f"no exit: leaving at layer {num_layers - 1} already costs more than {limit}"
    return chosen, f"exit at layer {chosen}: from there on the exit sweep stays within {limit}"


def _filters(votes: Sequence[float], inject: int, exit_layer: int) -> tuple[tuple[int, ...], str]:
    candidates = [layer for layer in range(inject, exit_layer) if votes[layer] > 0]
    ranked = sorted(candidates, key=lambda layer: (-votes[layer], layer))[:MOST_FILTERS]
    if not ranked:
        return (), (
            f"filters: no ILVAS curve has a local maximum in layers {inject} to {exit_layer - 1}, so "
            "they are spread evenly"
        )
    named = ", ".join(f"{layer} ({votes[layer]:.0%} of the curves)" for layer in sorted(ranked))
    return tuple(ranked), f"filters at local maxima of ILVAS: {named}"
