"""Plot a calibration: four panels over the layers, stages shaded, chosen layers marked.

    figure = draw(calibration, decision=-1)

Drawn with matplotlib's object interface, so no window system and no global state is needed.
"""

import base64
import io
import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from hidrop_fx.analysis.calibration.record import CalibrationRecord, Candidate
from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.schedule.schedule import Schedule

_VISION, _TEXT, _THIRD, _DARK = "#c2410c", "#1d4ed8", "#15803d", "#111827"
_STAGES = (
    ("text only", "#dbeafe"),
    ("vision fused and pruned", "#ffedd5"),
    ("text only", "#dcfce7"),
)


def draw(calibration: CalibrationRecord, decision: int = -1) -> Any:
    """Draw a matplotlib figure.

    Raises:
        HidropError: matplotlib is not installed.
        InputError: there is no such decision.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HidropError(
            "a plot needs matplotlib: pip install 'hidrop-fx[viz]', or use calibration.table()"
        ) from error
    schedule = _schedule(calibration, decision)
    decisions = calibration.decisions
    candidates = decisions[decision].candidates if decisions else ()
    lines = 0.3 * len(candidates) + 0.8 if candidates else 0
    figure = Figure(figsize=(11, 11.5 + lines), layout="constrained")
    grid = figure.add_gridspec(
        5 if lines else 4, 1, height_ratios=[2.8] * 4 + [lines] * bool(lines)
    )
    panels = [figure.add_subplot(grid[0])]
    panels += [figure.add_subplot(grid[n], sharex=panels[0]) for n in range(1, 4)]
    for axis in panels[:-1]:
        axis.tick_params(labelbottom=False)
    if candidates:
        _candidates(figure.add_subplot(grid[4]), candidates)
    painters = (_similarity, _attention, _ilvas, _sweeps)
    for axis, paint in zip(panels, painters, strict=True):
        paint(axis, calibration)
    _finish(figure, panels, calibration, schedule)
    return figure


def png(calibration: CalibrationRecord, decision: int = -1) -> str:
    """Draw the figure as PNG, base64-encoded."""
    buffer = io.BytesIO()
    draw(calibration, decision).savefig(buffer, dpi=90, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _schedule(calibration: CalibrationRecord, decision: int) -> Schedule:
    if not calibration.decisions:
        choice = calibration.choice
        exit_layer = None if choice.exit == calibration.num_layers else choice.exit
        return Schedule(inject=choice.inject, exit=exit_layer)
    try:
        return calibration.decisions[decision].schedule
    except IndexError as error:
        raise InputError(
            f"decision={decision}, but there are {len(calibration.decisions)} decisions"
        ) from error


def _line(axis: Any, values: Sequence[float | None], label: str, **style: Any) -> None:
    points = [(layer, value) for layer, value in enumerate(values) if value is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **({"marker": "o", "ms": 3.5} | style))


def _similarity(axis: Any, calibration: CalibrationRecord) -> None:
    measured = calibration.measurements
    _line(axis, measured.vision_similarity, "vision tokens", color=_VISION)
    _line(axis, measured.text_similarity, "text tokens", color=_TEXT)
    axis.set_ylabel("cosine of a token's state\nbefore and after the layer")
    _title(
        axis, "How little a layer changes its own tokens", "a dip is where vision begins to be used"
    )
    # The first layers change text so much that everything else would be a flat line.
    inner = [
        v for v in (*measured.vision_similarity, *measured.text_similarity[1:]) if v is not None
    ]
    if inner:
        low = min(inner)
        axis.set_ylim(low - 0.08 * (1 - low) - 1e-3, 1 + 0.04 * (1 - low) + 1e-3)
    axis.legend(loc="lower right")


def _attention(axis: Any, calibration: CalibrationRecord) -> None:
    measured = calibration.measurements
    _line(axis, measured.attention_mass, "attention on vision tokens (share, left)", color=_VISION)
    _line(
        axis,
        measured.influence,
        "influence of the image on text (1 - cosine, left)",
        color=_TEXT,
        marker="s",
    )
    axis.set_ylabel("share, 1 - cosine")
    axis.set_ylim(0, 1.3)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right = axis.twinx()
    spread = [None if h is None else math.exp(h) for h in measured.attention_entropy]
    _line(right, spread, "tokens it is spread over (right)", color=_THIRD, ls="--", marker="^")
    right.set_ylabel("vision tokens,\nexp(entropy)")
    right.set_ylim(0, 1.3 * max((value for value in spread if value is not None), default=1.0))
    _title(
        axis,
        "What the question reads from the image",
        "attention of the rows that decide what is kept",
    )
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axis.legend(
        handles, [handle.get_label() for handle in handles], loc="upper center", ncol=3, fontsize=9
    )


def _ilvas(axis: Any, calibration: CalibrationRecord) -> None:
    curves = calibration.measurements.ilvas
    windows = sorted({curve.window for curve in curves})
    for curve in curves:
        tops = sorted({c.top for c in curves if c.window == curve.window})
        shade = 0.35 + 0.65 * (tops.index(curve.top) + 1) / len(tops)
        style = {"color": (_VISION, _TEXT, _THIRD)[windows.index(curve.window) % 3], "alpha": shade}
        _line(axis, curve.values, f"{curve.window} ahead, top {curve.top}", lw=1.2, **style)
    axis.set_ylabel("ILVAS (cosine)")
    _title(
        axis,
        "Does what a layer attends to stay attended to?",
        "maxima are good places to prune",
    )
    if curves:
        axis.legend(loc="center right", ncol=len(windows), fontsize=8)


def _sweeps(axis: Any, calibration: CalibrationRecord) -> None:
    unit = "drop in accuracy" if calibration.labelled else "KL of the next token (nats)"
    damage = max(*calibration.exits.damage, *calibration.injections.damage)
    for sweep, label, color, marker in (
        (calibration.exits, "no vision from layer x on (exit)", _THIRD, "v"),
        (calibration.injections, "no vision before layer x (inject)", _TEXT, "^"),
    ):
        axis.plot(sweep.layers, sweep.damage, label=label, color=color, marker=marker, ms=4)
    allowed = calibration.tolerance * damage
    axis.axhline(allowed, color=_DARK, lw=0.8, ls=":")
    axis.annotate(
        f"tolerance, {calibration.tolerance:.0%} of the worst",
        (0.995, allowed),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axis.set_ylabel(unit)
    axis.set_xlabel("decoder layer (events happen at a layer's input)")
    _title(axis, "What is lost without vision in the last, or the first, layers", "lower is better")
    axis.legend(loc="center right", bbox_to_anchor=(1.0, 0.6))


def _candidates(axis: Any, candidates: Sequence[Candidate]) -> None:
    """Draw a bar for each method, the best on top, with its damage on the samples held out."""
    for height, one in enumerate(reversed(candidates)):
        assert one.search is not None
        best = height == len(candidates) - 1
        axis.barh(height, one.search.kl, height=0.62, color=_VISION if best else "#b8bfcc")
        accuracy = one.search.accuracy
        label = f"  {one.name}: {one.search.kl:.3f}" + (
            "" if accuracy is None else f", {accuracy:.0%} right"
        )
        end = max(one.search.kl, 0.0 if one.held_out is None else one.held_out.kl)
        axis.text(end, height, label, va="center", fontsize=8.5, color=_DARK)
        if one.held_out is not None:
            axis.plot(one.held_out.kl, height, marker="|", ms=11, mew=2, color=_TEXT)
    axis.set_yticks([])
    worst = max(one.search.kl for one in candidates if one.search is not None)
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_xlim(0, max(0.1, 40 * worst))  # room for the names
    axis.set_xlabel("KL in nats, from the full model")
    held_out = any(one.held_out is not None for one in candidates)
    _title(axis, "Methods inside the budget", "mark: on the samples held out" if held_out else "")


def _title(axis: Any, what: str, how: str) -> None:
    axis.set_title(what, loc="left", fontsize=11, fontweight="bold")
    axis.set_title(how, loc="right", fontsize=9, color="#4b5563")


def _finish(
    figure: Any, panels: Sequence[Any], calibration: CalibrationRecord, schedule: Schedule
) -> None:
    layers = calibration.num_layers
    exit_layer = layers if schedule.exit is None else schedule.exit
    edges = (-0.5, schedule.inject - 0.5, exit_layer - 0.5, layers - 0.5)
    for axis in panels:
        for (_, color), left, right in zip(_STAGES, edges, edges[1:], strict=False):
            if right > left:
                axis.axvspan(left, right, color=color, alpha=0.55, lw=0, zorder=0)
        for layer in schedule.prune:
            axis.axvline(layer, color=_DARK, lw=0.9, ls="--", alpha=0.7)
        axis.set_xlim(-0.5, layers - 0.5)
        axis.grid(axis="y", alpha=0.3)
    panels[0].set_xticks(range(0, layers, 1 if layers <= 16 else 2))
    _name_stages(panels[0], edges, schedule, exit_layer, layers)
    average = calibration.typical.plan(schedule, images=1).average_vision_tokens
    tokens = calibration.typical.tokens_per_image
    kept = f"{_pretty(schedule)} keeps {average:.1f} of {tokens} vision tokens a layer"
    figure.suptitle(
        f"Where {_short(calibration.model)} uses its vision tokens: {calibration.samples} samples\n"
        f"{fill(kept, 92)}",
        fontsize=12,
    )


def _name_stages(
    axis: Any, edges: Sequence[float], schedule: Schedule, exit_layer: int, layers: int
) -> None:
    """Write stages and events into a band above the first panel."""
    high = {"xycoords": ("data", "axes fraction"), "ha": "center", "annotation_clip": False}
    for (name, _), left, right in zip(_STAGES, edges, edges[1:], strict=False):
        if right > left:
            narrow = right - left < layers / 6
            label = name.replace(" ", "\n", 1) if narrow else name
            axis.annotate(
                label, ((left + right) / 2, 1.40), va="top", fontsize=11, color=_DARK, **high
            )
    events = {schedule.inject: "inject"} if schedule.inject else {}
    for layer, keep in schedule.prune.items():
        before = f"{events[layer]}\n" if layer in events else ""
        events[layer] = f"{before}keep\n{keep}"
    if exit_layer < layers:
        events[exit_layer] = "exit"
    for layer, label in events.items():
        # Inject and exit are edges between layers; a filter is the layer itself.
        place = layer if layer in schedule.prune else layer - 0.5
        axis.annotate(
            label,
            (place, 1.13),
            va="bottom",
            fontsize=9,
            color=_DARK,
            fontweight="bold",
            **high,
        )


def _pretty(schedule: Schedule) -> str:
    return str(schedule).replace(",", ", ").replace("+", " + ")


def _short(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return "the model" if name in ("", "model") else name
