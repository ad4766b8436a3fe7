"""Deepstack: features of tower layers that a decoder adds to its vision tokens on their way through the layers.

    for k, layer in enumerate(layers):
        hidden[vision] += features[k]          # at the input of every k in `deepstack.layers`
        hidden = layer(hidden)

A token gets an addition if it is among the rows that it is made to. One that enters late has missed those before;
`Schedule.deepstack` says whether it is given them then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Deepstack:
    """The places of a model's additions."""

    layers: tuple[int, ...]
    """Layers at whose input features are added, ascending; behind layer k is the input of layer k + 1."""
    of_layer: bool = False
    """True if an addition is part of the layer whose input it changes, so that a token which enters there gets
    it; False if it is part of the layer before."""
    whole: bool = False
    """True if vision tokens are their additions alone, and enter as zeros."""

    def on_entering(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the layers whose additions a vision token gets as it enters."""
        before = [k for k in self.layers if k <= schedule.inject]
        if schedule.deepstack == "skip":
            before = [k for k in before if k == schedule.inject and self.of_layer]
        return tuple(before)

    def after_entering(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the layers at whose input vision tokens are there already."""
        return tuple(k for k in self.layers if k > schedule.inject)

    def described(self, schedule: Schedule) -> str:
        """Say in one line where features are added under a schedule."""
        parts = [f"features join vision tokens at layer {_listed(self.layers)}"]
        entering, inject = self.on_entering(schedule), schedule.inject
        missed = [k for k in self.layers if k <= inject and k not in entering]
        if entering and inject:
            parts.append(f"as they enter at layer {inject}, those of layer {_listed(entering)}")
        if missed and inject:
            parts.append(f"those of layer {_listed(missed)} are left out")
        return "; ".join(parts)

    def loses_images(self, schedule: Schedule) -> bool:
        """Return True if vision tokens that are their additions alone enter without all that came before."""
        missed = tuple(k for k in self.layers if k <= schedule.inject)
        return self.whole and missed != self.on_entering(schedule)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
