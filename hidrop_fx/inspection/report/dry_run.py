"""Explain a call: what it would do with these inputs, without running the decoder.

    print(hidrop_fx.explain(model, **inputs))

Which columns of each row are text, vision or padding, how long every segment gets, what would be
compiled, what it costs, and what looks wrong.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from torch import Tensor

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare_batch
from hidrop_fx.inspection.report.explanation import Explanation, RowExplanation
from hidrop_fx.inspection.report.ranges import ranges
from hidrop_fx.inspection.report.row_costs import costs_of_rows
from hidrop_fx.inspection.table import plural
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.runtime.deepstack import described_deepstack
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

# A share of padding from which on it is worth a word.
_MUCH_PADDING = 0.3


def explain(model: Any, *, schedule: Schedule | str | None = None, **inputs: Any) -> Explanation:
    """Tell what a call with these inputs would do. Neither decoder nor vision tower run.

    Args:
        model: compiled, or not if a schedule is given.
        schedule: None for the one that the model was compiled with, or that is in use; else a schedule, its text, or
            a name that `compile` was given.
        inputs: what `model(...)` takes.

    Raises:
        HidropError: the model is not compiled and no schedule is given.
    """
    bound = runtime_of(model)
    if schedule is None and bound is None:
        raise HidropError(
            f"this {type(model).__name__} is not compiled; pass schedule=..., or call "
            "hidrop_fx.compile(model, schedule) first"
        )
    named = None if bound is None or schedule is None else bound.under(schedule)
    if named is not None:
        bound, schedule = named, named.schedule
    if isinstance(schedule, str):
        depth = model.config.get_text_config().num_hidden_layers
        schedule = Schedule.parse(schedule, num_layers=depth)
    if schedule is None:
        assert bound is not None
        schedule = bound.schedule
    try:
        batch = prepare_batch(model, schedule, inputs, encode=False)
    except HidropError as error:
        return Explanation(schedule=schedule, problems=(str(error),), refused=True)
    costs = costs_of_rows(model, batch.layout)
    longest = max(costs, key=lambda p: sum(p.identity.tokens))
    rows = _rows(batch)
    return Explanation(
        schedule=schedule,
        rows=rows,
        segments=_segments(batch.layout),
        caches=_caches(batch.layout),
        shapes=_shapes(batch),
        compiles=() if bound is None else _pending(bound, batch),
        passes=() if bound is None else tuple(p.__name__ for p in bound.options.passes),
        deepstack=described_deepstack(model, schedule),
        plan=longest,
        flops=sum(p.flops for p in costs),
        identity_flops=sum(p.identity.flops for p in costs),
        kv_bytes=sum(p.kv_bytes for p in costs),
        identity_kv_bytes=sum(p.identity.kv_bytes for p in costs),
        problems=_problems(batch, rows, schedule, inputs, model),
    )


def _segments(layout: Layout) -> tuple[tuple[str, int], ...]:
    """Return first layer, reason and length of each segment; of the text stream if a layer sees it alone."""
    return tuple(
        (f"{segment.start} {segment.reason}", layout.lengths[segment.name])
        for segment in layout.plan.segments
        if segment.layers or segment.parent is not None
    )


def _caches(layout: Layout) -> tuple[tuple[str, int], ...]:
    """Return runs of layers whose caches are left as many tokens, and that number; none where caches stay whole."""
    runs = groupby(layout.plan.cuts, key=lambda cut: layout.lengths[cut.name])
    return tuple((ranges([cut.layer for cut in cuts]), left) for left, cuts in runs)


def _rows(batch: Batch) -> tuple[RowExplanation, ...]:
    found = []
    for row in range(batch.rows):
        text, vision = (
            batch.given_columns(batch.row_columns(name, row), row) for name in ("text", "vision")
        )
        taken = {*text.tolist(), *vision.tolist()}
        real = batch.call.prompt.mask[row]
        padding = [c for c in range(len(real)) if c not in taken and not bool(real[c])]
        found.append(
            RowExplanation(
                text=_spans(text),
                vision=_spans(vision),
                padding=ranges(padding) or "none",
                text_tokens=len(text),
                vision_tokens=len(vision),
                removed=batch.layout.removed[row],
                images=batch.layout.images[row],
                units=batch.layout.units[row],
            )
        )
    return tuple(found)


def _spans(columns: Tensor) -> str:
    return ranges([int(column) for column in columns]) or "none"


def _shapes(batch: Batch) -> str:
    rows = "a batch of one" if batch.rows == 1 else "any batch of two or more"
    return (
        f"lengths are symbolic, so there are no entries: what is compiled for {rows} serves every "
        "prompt length, image count and keep count"
    )


def _pending(runtime: Runtime, batch: Batch) -> tuple[str, ...]:
    """Tell what a `generate` of this batch would still trace or compile before its first token."""
    known = runtime.programs.known_capture()
    if known is None:
        return (
            "the decoder would be captured, and its prefill and decode programs made and compiled",
        )
    made = [
        e
        for e in known.executables.values()
        if e.program.kind == "prefill" and e.program.variant.masks == batch.call.masks
    ]
    if not made:
        return ("a prefill program would be made and compiled",)
    if runtime.options.backend == "eager":
        return ("nothing would be compiled: the backend is eager",)
    one = batch.rows == 1
    compiled = {e.name for e in runtime.programs.log.entries if e.shapes.startswith("[1,") == one}
    missing = [name for e in made for name in e.bodies if e.bodies[name].name not in compiled]
    if missing:
        return (f"{plural(len(missing), 'body')} would be compiled: {', '.join(missing)}",)
    return ("nothing would be compiled",)


def _problems(
    batch: Batch,
    rows: tuple[RowExplanation, ...],
    schedule: Schedule,
    inputs: Mapping[str, Any],
    model: Any,
) -> tuple[str, ...]:
    found = []
    without = [index for index, row in enumerate(rows) if not row.images]
    if without:
        found.append(
            f"rows {_listed(without)} have no image: the schedule changes nothing for them, and their "
            "segments are padded to those of the others. Batch them apart"
        )
    for event in batch.layout.plan.of_kind("prune"):
        layer, keep = event.layer, event.keep
        left = batch.layout.vision_counts[event.name]
        idle = [i for i, row in enumerate(rows) if row.images and left[i] >= row.vision_tokens]
        if idle:
            found.append(
                f"prune layer {layer} keeps {keep}, which is every vision token of rows {_listed(idle)}: "
                f"it scores them and drops none. Keep fewer than {rows[idle[0]].vision_tokens}"
            )
    total = sum(row.text_tokens + row.vision_tokens + row.removed for row in rows)
    share = 1 - total / (batch.call.prompt.length * len(rows))
    if share > _MUCH_PADDING:
        found.append(
            f"{share:.0%} of the batch is padding; group prompts of like length into batches"
        )
    mask = inputs.get("attention_mask")
    pad = getattr(model.generation_config, "pad_token_id", None)
    ids = inputs.get("input_ids")
    if mask is None and pad is not None and ids is not None:
        ends = (ids[:, 0] == pad) | (ids[:, -1] == pad)
        if bool(ends.any()):
            found.append(
                f"rows {_listed(ends.nonzero().flatten().tolist())} begin or end with the padding token "
                f"{pad}, but there is no attention_mask: padding would be read as text. Pass the "
                "processor's attention_mask"
            )
    return tuple(found)


def _listed(rows: list[int]) -> str:
    return ranges(rows) or "none"
