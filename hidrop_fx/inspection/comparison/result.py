"""The result of `compare`: a line a layer, and the first difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hidrop_fx.inspection.comparison.differences import LayerDifference, ValueDifference, worst_of
from hidrop_fx.inspection.table import Report, Table


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """Two runs of one prompt, layer by layer."""

    reference: str
    """"transformers", "loop" or "program"."""
    backend: str
    lowering: str
    disabled: tuple[str, ...]
    layers: tuple[LayerDifference, ...]
    """One for each decoder layer, and one for the normalised output."""
    steps: tuple[LayerDifference, ...] = ()
    """Of the tokens that were decoded: one for each layer, the output and the logits."""
    loss: ValueDifference | None = None
    gradients: tuple[ValueDifference, ...] = ()
    """Of every parameter, where labels were given."""
    fallbacks: tuple[str, ...] = ()

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that departs beyond tolerance, in prefill or train, then in decode."""
        return next((layer for layer in (*self.layers, *self.steps) if layer.departs), None)

    @property
    def worst_gradient(self) -> ValueDifference | None:
        """The gradient that departs most; None if there are none."""
        return worst_of(self.gradients)

    @property
    def nearest_gradient(self) -> ValueDifference | None:
        """Of those that depart, the one nearest to the loss: what is wrong there spreads to all before."""
        return next((g for g in reversed(self.gradients) if g.departs), None)

    @property
    def ok(self) -> bool:
        """True if nothing departs: no layer, no gradient, nor the loss."""
        values = (*self.gradients, *([self.loss] if self.loss else []))
        return self.first is None and not any(value.departs for value in values)

    @property
    def tables(self) -> list[Table]:
        """Tables that are printed."""
        found = [self._verdict(), _table("Hidden states that each layer hands on", self.layers)]
        if self.steps:
            found.append(_table("The same of the decoded tokens", self.steps))
        if self.loss is not None:
            found.append(self._values(self.loss))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "ok": self.ok,
            "first": None if self.first is None else self.first.region,
            "reason": None if self.first is None else self.first.reason,
            "reference": self.reference,
            "backend": self.backend,
            "lowering": self.lowering,
            "disabled": list(self.disabled),
            "layers": [layer.to_dict() for layer in self.layers],
            "steps": [layer.to_dict() for layer in self.steps],
            "loss": None if self.loss is None else self.loss.to_dict(),
            "worst_gradient": None if self.worst_gradient is None else self.worst_gradient.name,
            "nearest_gradient": None
            if self.nearest_gradient is None
            else self.nearest_gradient.name,
            "gradients": [gradient.to_dict() for gradient in self.gradients],
            "fallbacks": list(self.fallbacks),
        }

    def _verdict(self) -> Table:
        names = {
            "transformers": "transformers' own forward",
            "loop": "a plain loop over the model's own layers",
            "program": "the same program, uncompiled",
        }
        setting = f"backend {self.backend}, lowering {self.lowering}"
        if self.disabled:
            setting += f", without {', '.join(self.disabled)}"
        notes = [f"reference  {names[self.reference]}", f"program    {setting}"]
        return Table(title=self._sentence(), notes=(*notes, *self.fallbacks))

    def _sentence(self) -> str:
        if self.first is not None:
            return f"{self.first.region} is the first to depart: it {self.first.reason}"
        if self.loss is not None and self.loss.departs:
            return f"every layer agrees, and the loss differs by {self.loss.largest:.1e}"
        gradient, nearest = self.worst_gradient, self.nearest_gradient
        if gradient is not None and nearest is not None:
            return (
                f"layers and loss agree, and the gradient of {gradient.name} departs most: by "
                f"{gradient.relative:.1e} of its largest value, {gradient.tolerance:.0e} is allowed; "
                f"nearest to the loss is that of {nearest.name}"
            )
        worst = max((*self.layers, *self.steps), key=lambda layer: layer.relative)
        return f"equal within tolerance; the largest difference is {worst.relative:.1e}, at {worst.region}"

    def _values(self, loss: ValueDifference) -> Table:
        listed = sorted(self.gradients, key=lambda value: value.relative, reverse=True)
        shown = [loss, *listed[:_GRADIENTS]]
        rows = tuple(
            (v.name, f"{v.largest:.1e}", f"{v.relative:.1e}", "departs" if v.departs else "")
            for v in shown
        )
        beyond = sum(value.departs for value in listed)
        note = f"{beyond} of {len(listed)} gradients depart; the first {len(shown) - 1} are shown"
        columns = ("<value", "largest", "of scale", "<")
        return Table(title="Loss and gradients", columns=columns, rows=rows, notes=(note,))


# Of a large model, most say the same.
_GRADIENTS = 8

COLUMNS = ("<layer", "tokens", "missing", "added", "largest", "mean", "of scale", "<")


def _table(title: str, layers: Sequence[LayerDifference]) -> Table:
    return Table(title=title, columns=COLUMNS, rows=tuple(difference_row(x) for x in layers))


def difference_row(layer: LayerDifference) -> tuple[str, ...]:
    """Return the cells of `COLUMNS`."""
    return (
        layer.region,
        *(str(n) for n in (layer.tokens, layer.missing, layer.added)),
        *(f"{x:.1e}" for x in (layer.largest, layer.mean, layer.relative)),
        "departs" if layer.departs else "",
    )
