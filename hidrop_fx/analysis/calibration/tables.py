"""A calibration as tables: the layers, the decisions, the cost."""

from hidrop_fx.analysis.calibration.record import CalibrationRecord, Decision, Score
from hidrop_fx.inspection.table import Table

_PANELS = ("vision sim", "text sim", "influence", "mass", "entropy")


def tables(calibration: CalibrationRecord) -> list[Table]:
    """Build the tables of a calibration."""
    found = [_layers(calibration), _choice(calibration)]
    if calibration.decisions:
        found.append(_schedules(calibration))
        found += [
            Table(
                title=f"How schedule {number} came about",
                notes=(str(decision.schedule), *(f"- {why}" for why in decision.reasons)),
            )
            for number, decision in enumerate(calibration.decisions)
        ]
        found += [_methods(n, d) for n, d in enumerate(calibration.decisions) if d.candidates]
    return found


def _layers(calibration: CalibrationRecord) -> Table:
    measured = calibration.measurements
    curves = (
        measured.vision_similarity,
        measured.text_similarity,
        measured.influence,
        measured.attention_mass,
        measured.attention_entropy,
    )
    votes = calibration.choice.votes
    exits = dict(zip(calibration.exits.layers, calibration.exits.damage, strict=True))
    injections = dict(
        zip(calibration.injections.layers, calibration.injections.damage, strict=True)
    )
    rows = tuple(
        (
            str(layer),
            *(_number(curve[layer]) for curve in curves),
            f"{votes[layer]:.0%}",
            _number(injections.get(layer)),
            _number(exits.get(layer)),
        )
        for layer in range(calibration.num_layers)
    )
    damage = "drop in accuracy" if calibration.labelled else "KL in nats"
    return Table(
        title=f"Calibration of {calibration.model} on {calibration.samples} samples",
        columns=("layer", *_PANELS, "ILVAS max", "inject here", "exit here"),
        rows=rows,
        notes=(
            "sim: cosine of a token's state before and after the layer; influence: 1 - cosine of text under",
            "two images; mass, entropy: attention on vision (share) and its spread (nats); ILVAS max: share",
            f"of the curves with a maximum here; inject, exit: {damage}",
            f"{calibration.passes} forward passes of the decoder, {calibration.seconds:.1f} s in all",
        ),
    )


def _choice(calibration: CalibrationRecord) -> Table:
    return Table(title="Layers", notes=calibration.choice.reasons)


def _schedules(calibration: CalibrationRecord) -> Table:
    return Table(
        title="Schedules (samples chosen on, and held out)",
        columns=("", "<from", "<schedule", "<budget", "KL", "accuracy", "KL held out", "accuracy"),
        rows=tuple(_row(n, decision) for n, decision in enumerate(calibration.decisions)),
    )


def _row(number: int, decision: Decision) -> tuple[str, ...]:
    return (
        str(number),
        decision.origin,
        str(decision.schedule),
        decision.budget,
        *_score(decision.search),
        *_score(decision.held_out),
    )


def _methods(number: int, decision: Decision) -> Table:
    return Table(
        title=f"Methods held against each other for schedule {number}, {decision.budget}",
        columns=("<method", "<schedule", "cost", "KL", "accuracy", "KL held out", "accuracy"),
        rows=tuple(
            (
                one.name,
                str(one.schedule),
                f"{one.cost:.4g}",
                *_score(one.search),
                *_score(one.held_out),
            )
            for one in decision.candidates
        ),
    )


def _score(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "-", "-"
    return f"{score.kl:.4f}", "-" if score.accuracy is None else f"{score.accuracy:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
