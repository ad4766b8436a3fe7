"""What a call would do, as `explain` returns it."""

from dataclasses import asdict, dataclass
from typing import Any

from hidrop_fx.inspection.table import Report, Table, amount, ratio, size
from hidrop_fx.planning import Costs
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class RowExplanation:
    """One row of the batch: its columns and counts."""

    text: str
    """Columns of its text stream, e.g. "0-4, 581-589"."""
    vision: str
    padding: str
    text_tokens: int
    vision_tokens: int
    removed: int
    """Vision tokens that the schedule's reducer takes out before the decoder."""
    images: int
    units: int
    """What an int keep counts: its images and videos, or their tiles or frames."""


@dataclass(frozen=True, kw_only=True)
class Explanation(Report):
    """What a call would do: rows, segments, compilation, costs, problems."""

    schedule: Schedule
    rows: tuple[RowExplanation, ...] = ()
    segments: tuple[tuple[str, int], ...] = ()
    """Length of each token set, padding included, in the order of the layers."""
    caches: tuple[tuple[str, int], ...] = ()
    """Layers, e.g. "0-7", and the tokens that their caches are left, padding included, where the schedule cuts caches."""
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
    deepstack: str = ""
    """Where the model adds features to vision tokens between its layers, in words; empty where it does not."""
    refused: bool = False
    """True if the call would raise; the problem is then the message."""

    @property
    def ok(self) -> bool:
        """True if there is no problem."""
        return not self.problems

    @property
    def tables(self) -> list[Table]:
        """Tables that are printed."""
        title = "This call would be refused" if self.refused else "What this call would do"
        passes = (f"passes    {', '.join(self.passes)}",) if self.passes else ()
        deepstack = (f"deepstack {self.deepstack}",) if self.deepstack else ()
        found = [Table(title=title, notes=(f"schedule  {self.schedule}", *passes, *deepstack))]
        if not self.refused:
            found += [self._rows(), self._streams(), self._costs()]
            found.append(Table(title="Compilation", notes=(self.shapes, *self.compiles)))
        if self.problems:
            found.append(Table(title="Problems", notes=self.problems))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "refused": self.refused,
            "problems": list(self.problems),
            "passes": list(self.passes),
            "deepstack": self.deepstack,
            "schedule": self.schedule.to_dict(),
            "rows": [asdict(row) for row in self.rows],
            "segments": [{"name": name, "tokens": tokens} for name, tokens in self.segments],
            "caches": [{"layers": layers, "tokens": tokens} for layers, tokens in self.caches],
            "shapes": self.shapes,
            "compiles": list(self.compiles),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "flops": self.flops,
            "identity_flops": self.identity_flops,
            "kv_bytes": self.kv_bytes,
            "identity_kv_bytes": self.identity_kv_bytes,
        }

    def _rows(self) -> Table:
        per = self.schedule.per
        rows = tuple(
            (str(i), str(r.images), *([] if per == "item" else [str(r.units)]), str(r.text_tokens), r.text, str(r.vision_tokens), r.vision, r.padding)
            for i, r in enumerate(self.rows)
        )  # fmt: skip
        counted = () if per == "item" else (f"{per}s",)
        columns = (
            "row",
            "images",
            *counted,
            "text",
            "<at columns",
            "vision",
            "<at columns",
            "<padding",
        )
        notes: tuple[str, ...] = ()
        if self.schedule.before is not None:
            removed = "+".join(str(row.removed) for row in self.rows)
            notes = (
                f"{self.schedule.before} takes {removed} vision tokens out before the decoder; which ones is known when "
                "it runs: shown are the first of each image",
            )
            if self.schedule.decides_by_pixels:
                notes = (
                    f"{self.schedule.before} takes vision tokens out before the vision tower; how many follows from the "
                    "pixels: shown and counted are all, the most that stay",
                )
        return Table(title="Rows", columns=columns, rows=rows, notes=notes)

    def _streams(self) -> Table:
        rows = tuple((name.replace("_", " "), str(tokens)) for name, tokens in self.segments)
        notes = ["a segment is as long as its longest row; padding goes to its end"]
        if self.caches:
            left = ", ".join(f"{tokens} (layers {layers})" for layers, tokens in self.caches)
            notes.append(f"{self.schedule.cache} leaves caches of {left}")
        columns = ("<from layer", "tokens")
        return Table(title="Streams", columns=columns, rows=rows, notes=tuple(notes))

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
