"""Reducers: what an image's tokens become before the decoder sees them.

    @register_reducer("thinned", keep=lambda tokens, *, stride: -(-tokens // stride))
    def thinned(features, keep, *, stride=2):        # [E, n, D] of E images, the number to keep
        return torch.arange(0, features.shape[1], stride).expand(len(features), -1), None

    Schedule(before="thinned(stride=4)", positions="compact")

A reducer returns which places stay, int64 [E, keep], ascending, and what stands there, [E, keep, D], or None for the features
as they are. Places that do not stay are no tokens: no layer sees them. The decoder's own events follow on what is left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, TypeVar

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.call_text import call_text, checked_arguments, name_in
from hidrop_fx.methods.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])
# Tokens of an image larger than any, on a square grid.
_MANY = 1 << 20
GIVEN: dict[str, str] = {
    "text": "fp32 [E, D], mean of the normalised embeddings of the row's text tokens",
    "tower": "`TowerTokens` of the vision tower, before the projector",
}
"""Arguments that a reducer may ask for -> their contents. E images."""


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """A rule that leaves fewer tokens of each image, by their contents."""

    name: str
    reduce: Callable[..., Any] | str
    """`(features [E, n, D], keep, **arguments)`, or its "module:function", imported when it is first run."""
    keep: Callable[..., int]
    """Return how many of an image's tokens stay, from their number and the arguments."""
    needs: tuple[str, ...] = ()
    """Out of `GIVEN`, handed over by name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that a schedule may give, with their values where it does not."""
    counts: tuple[str, ...] = ()
    """Those of them that say how much stays, so that a search may scale them: tokens (int) or a share (float)."""
    moves: bool = False
    """Tokens that it returns lie at other places than those of the image that they show."""
    per_frame: bool = False
    """Each frame of a video is reduced for itself, as an image is."""
    members: bool = False
    """It also returns whose position ids a token bears: places int64 [E, keep, K], K of its argument `copies`. Of the
    dimensions that RoPE turns by an axis, each K-th part, in order, is turned by the ids of one of them."""
    module: str | None = None
    """Name of a trained module that it runs on the pixels, before the vision tower, which encodes what stays alone. How
    much that is follows from the pixels: `keep` is the most, and `reduce` is `(logits fp32 [t, h, w]) -> bool [t, h, w]`
    over the cells of an image, each of which becomes one token."""

    def __hash__(self) -> int:
        return hash((self.name, self.reduce))

    @property
    def reads_tower(self) -> bool:
        """It runs on what the vision tower holds, so that a call needs pixels."""
        return "tower" in self.needs

    @property
    def reads_pixels(self) -> bool:
        """A call needs pixels, since what an encoder made of them does not tell enough."""
        return self.reads_tower or self.module is not None

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function, imported."""
        if not isinstance(self.reduce, str):
            return self.reduce
        module, _, name = self.reduce.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


REDUCERS: Registry[Reducer] = Registry("before", default="")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reducer with its arguments, as a schedule names it."""

    reducer: Reducer
    arguments: tuple[tuple[str, Any], ...]
    """All of the reducer's arguments, in its order."""

    @property
    def copies(self) -> int:
        """How many position ids a token bears on each axis."""
        return int(dict(self.arguments)["copies"]) if self.reducer.members else 1

    def kept(self, tokens: int) -> int:
        """Count what stays of an image's tokens: at least one, at most all."""
        return max(1, min(tokens, self.reducer.keep(tokens, **dict(self.arguments))))

    def __str__(self) -> str:
        return call_text(self.reducer.name, dict(self.arguments))


def reduction(text: str) -> Reduction:
    """Read "divprune(ratio=0.098)".

    Raises:
        ScheduleError: no such reducer, or arguments that it does not take.
    """
    return _reduction(text, REDUCERS[name_in(text)])  # registered now, whatever was before


@lru_cache(maxsize=256)
def _reduction(text: str, reducer: Reducer) -> Reduction:
    arguments = checked_arguments("before", text, reducer.name, reducer.defaults)
    try:
        found = reducer.keep(_MANY, **arguments)  # for its checks of the arguments
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ScheduleError(f"before={text!r}: {error}") from None
    if not isinstance(found, int):
        raise ScheduleError(
            f"before={text!r}: {reducer.name} would keep {found!r} of {_MANY} tokens"
        )
    return Reduction(reducer=reducer, arguments=tuple(arguments.items()))


def register_reducer(
    name: str,
    *,
    keep: Callable[..., int],
    needs: tuple[str, ...] = (),
    counts: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register the decorated function as a reducer; its keywords with defaults are the arguments.

    Args:
        keep: `(tokens of an image, **arguments) -> tokens that stay`; raises ValueError for a bad argument.
        needs: keywords out of `GIVEN` that the function is handed.
        counts: arguments that say how much stays, ints of tokens or floats of a share; a search may scale them.

    Raises:
        ScheduleError: the name is taken, or a need is unknown.
    """
    unknown = [need for need in needs if need not in GIVEN]
    if unknown:
        raise ScheduleError(
            f"reducer {name!r} needs {', '.join(unknown)}, which nothing provides; it may need {', '.join(GIVEN)}"
        )

    def register(function: F) -> F:
        keywords = inspect.signature(function).parameters.values()
        defaults = {
            p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY and p.name not in needs
        }
        REDUCERS.add(
            name,
            Reducer(
                name=name, reduce=function, keep=keep, needs=needs, defaults=defaults, counts=counts
            ),
        )
        return function

    return register
