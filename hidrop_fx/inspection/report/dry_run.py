"""`explain`: what a call would do with these inputs, without running the decoder.

    print(hidrop_fx.explain(model, **inputs))

Which columns of each row are text, vision or padding, how long every segment gets, what would be
compiled, what it costs, and what looks wrong.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare
from hidrop_fx.inspection.report.last_call import as_it_ran, runs
from hidrop_fx.inspection.table import Report, Table, amount, plural, ratio, size
from hidrop_fx.planning import Costs, plan
from hidrop_fx.runtime.fingerprint import fingerprint
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

# A share of padding from which on it is worth a word.
_MUCH_PADDING = 0.3


@dataclass(frozen=True, kw_only=True)
class RowExplanation:
    """One row of the batch."""

    text: str
    """Columns of its text stream, e.g. "0-4, 581-589"."""
    vision: str
    padding: str
    text_tokens: int
    vision_tokens: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Explanation(Report):
    """What a call would do."""

    schedule: Schedule
    rows: tuple[RowExplanation, ...] = ()
    segments: tuple[tuple[str, int], ...] = ()
    """Length of each token set, padding included, in the order of the layers."""
    shapes: str = ""
    """What the compiled code is specialised to for these inputs."""
    compiles: tuple[str, ...] = ()
    """What the first such call still has to do."""
    plan: Costs | None = None
    """Of the row with the most tokens."""
    flops: int = 0
    """Of all rows, padding excluded, as `Costs.flops`."""
    identity_flops: int = 0
    kv_bytes: int = 0
    """Of all rows' prompts, padding excluded."""
    identity_kv_bytes: int = 0
    problems: tuple[str, ...] = ()
    """What is wrong or suspicious, with the remedy."""
    passes: tuple[str, ...] = ()
    """Passes of the user's own that the compiled model runs."""
    refused: bool = False
    """Whether the call would raise; the problem is then the message."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def tables(self) -> list[Table]:
        """What is printed, table by table."""
        title = "This call would be refused" if self.refused else "What this call would do"
        passes = (f"passes    {', '.join(self.passes)}",) if self.passes else ()
        found = [Table(title=title, notes=(f"schedule  {self.schedule}", *passes))]
        if not self.refused:
            found += [self._rows(), self._streams(), self._costs()]
            found.append(Table(title="Compilation", notes=(self.shapes, *self.compiles)))
        if self.problems:
            found.append(Table(title="Problems", notes=self.problems))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold."""
        return {
            "refused": self.refused,
            "problems": list(self.problems),
            "passes": list(self.passes),
            "schedule": self.schedule.to_dict(),
            "rows": [asdict(row) for row in self.rows],
            "segments": [{"name": name, "tokens": tokens} for name, tokens in self.segments],
            "shapes": self.shapes,
            "compiles": list(self.compiles),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "flops": self.flops,
            "identity_flops": self.identity_flops,
            "kv_bytes": self.kv_bytes,
            "identity_kv_bytes": self.identity_kv_bytes,
        }

    def _rows(self) -> Table:
        rows = tuple(
            (str(i), str(r.images), str(r.text_tokens), r.text, str(r.vision_tokens), r.vision, r.padding)
            for i, r in enumerate(self.rows)
        )  # fmt: skip
        columns = ("row", "images", "text", "<at columns", "vision", "<at columns", "<padding")
        return Table(title="Rows", columns=columns, rows=rows)

    def _streams(self) -> Table:
        rows = tuple((name.replace("_", " "), str(tokens)) for name, tokens in self.segments)
        note = "a segment is as long as its longest row; padding goes to its end"
        columns = ("<from layer", "tokens")
        return Table(title="Streams", columns=columns, rows=rows, notes=(note,))

    def _costs(self) -> Table:
        rows = (
            (
                "prefill FLOPs",
                amount(self.flops),
                amount(self.identity_flops),
                ratio(self.identity_flops, self.flops),
            ),
            (
                "KV of the prompt",
                size(self.kv_bytes),
                size(self.identity_kv_bytes),
                ratio(self.identity_kv_bytes, self.kv_bytes),
            ),
        )
        columns = ("<", "schedule", "identity", "ratio")
        return Table(title="Expected costs, all rows, no padding", columns=columns, rows=rows)


def explain(model: Any, *, schedule: Schedule | str | None = None, **inputs: Any) -> Explanation:
    """Tell what a call with these inputs would do. Neither decoder nor vision tower run.

    Args:
        schedule: None for the one that the model was compiled with.
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
    if isinstance(schedule, str):
        depth = model.config.get_text_config().num_hidden_layers
        schedule = Schedule.parse(schedule, num_layers=depth)
    if schedule is None:
        assert bound is not None
        schedule = bound.schedule
    try:
        batch = prepare(model, schedule, inputs, encode=False)
    except HidropError as error:
        return Explanation(schedule=schedule, problems=(str(error),), refused=True)
    plans = _plans(model, batch)
    longest = max(plans, key=lambda p: sum(p.identity.tokens))
    segments = tuple(
        (_first_layer(name, schedule), length) for name, length in batch.layout.lengths.items()
    )
    rows = _rows(batch)
    return Explanation(
        schedule=schedule,
        rows=rows,
        segments=segments if schedule.inject else segments[1:],
        shapes=_shapes(batch),
        compiles=() if bound is None else _pending(bound, batch),
        passes=() if bound is None else tuple(p.__name__ for p in bound.options.passes),
        plan=longest,
        flops=sum(p.flops for p in plans),
        identity_flops=sum(p.identity.flops for p in plans),
        kv_bytes=sum(p.kv_bytes for p in plans),
        identity_kv_bytes=sum(p.identity.kv_bytes for p in plans),
        problems=_problems(batch, rows, schedule, inputs, model),
    )


def _first_layer(name: str, schedule: Schedule) -> str:
    return "0 text" if name == "text" else " ".join(reversed(name.split("_")))


def _plans(model: Any, batch: Batch) -> list[Costs]:
    @lru_cache
    def plan_of(schedule: Schedule, text: int, vision: int, images: int) -> Costs:
        return plan(schedule, model, text_tokens=text, vision_tokens=vision, images=images)

    plans = []
    for row, images in enumerate(batch.layout.images):
        counts = len(batch.row_columns("text", row)), len(batch.row_columns("vision", row))
        if batch.schedule.learns:
            learned = as_it_ran(batch.schedule, batch.layout, row)
            plans.append(plan_of(learned, *counts, images=1))
        else:
            plans.append(plan_of(batch.schedule, *counts, images=images))
    return plans


def _rows(batch: Batch) -> tuple[RowExplanation, ...]:
    found = []
    for row in range(batch.rows):
        text, vision = (batch.row_columns(name, row) for name in ("text", "vision"))
        taken = {*text.tolist(), *vision.tolist()}
        padding = [column for column in range(batch.columns) if column not in taken]
        found.append(
            RowExplanation(
                text=spans(text),
                vision=spans(vision),
                padding=spans(torch.tensor(padding)),
                text_tokens=len(text),
                vision_tokens=len(vision),
                images=batch.layout.images[row],
            )
        )
    return tuple(found)


def spans(columns: Tensor) -> str:
    """Ascending columns as ranges: "0-4, 581-589"; "none" if there are none."""
    listed = [int(column) for column in columns]
    gathered = runs([column - index for index, column in enumerate(listed)])
    parts = [(listed[first], listed[last]) for first, last, _ in gathered]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts) or "none"


def _shapes(batch: Batch) -> str:
    rows = "a batch of one" if batch.rows == 1 else "any batch of two or more"
    return (
        f"lengths are symbolic, so there are no entries: what is compiled for {rows} serves every "
        "prompt length, image count and keep count"
    )


def _pending(runtime: Runtime, batch: Batch) -> tuple[str, ...]:
    """What a `generate` of this batch would still trace or compile before its first token."""
    known = runtime.programs.captures.get(fingerprint(runtime.model.get_decoder()))
    if known is None:
        return (
            "the decoder would be captured, and its prefill and decode programs made and compiled",
        )
    windows = tuple(name for name, window in known.windows.items() if batch.columns > window)
    made = [
        e
        for e in known.executables.values()
        if e.program.kind == "prefill" and _windows(e) == windows
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


def _windows(executable: Any) -> tuple[str, ...]:
    for stage in executable.program.history:
        if "masks" in stage.options:
            return tuple(stage.options["masks"])
    return ()


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
    for layer, keep in schedule.prune.items():
        idle = [
            index
            for index, row in enumerate(rows)
            if row.images
            and schedule.keep_counts(row.vision_tokens, row.images)[layer] >= row.vision_tokens
        ]
        if idle:
            found.append(
                f"prune layer {layer} keeps {keep}, which is every vision token of rows {_listed(idle)}: "
                f"it scores them and drops none. Keep fewer than {rows[idle[0]].vision_tokens}"
            )
    total = sum(row.text_tokens + row.vision_tokens for row in rows)
    share = 1 - total / (batch.columns * len(rows))
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
    return spans(torch.tensor(rows))
