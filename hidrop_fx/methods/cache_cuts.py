"""Cache cuts: what a layer's KV cache keeps of a prompt once all of it has been read.

    @register_cache_cut("key_norm", capacity=lambda tokens, *, capacity: capacity)
    def key_norm(key, *, window=0, capacity=256):             # [B, G, S, d], after RoPE
        return -key.float().norm(dim=-1)                      # fp32 [B, G, S], the highest stay

    Schedule(cache="key_norm(capacity=128)")

Every layer runs on all tokens that the schedule's other stages leave it. Then the cache of each keeps, for each KV head by
itself, the last `window` tokens and the best others, `capacity` in all. A row that has no more tokens keeps all of them.
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
# Tokens of a prompt longer than any, and a depth, to try the arguments of a capacity on.
_MANY, _LAYERS = 1 << 20, 2
GIVEN: dict[str, str] = {
    "query": "[B, H, W, d], queries of the last W tokens of each row, after RoPE",
    "key": "[B, G, S, d], keys of all tokens, after RoPE",
    "value": "[B, G, S, e]",
    "seen": "bool [B, 1, W, S], the tokens that each of these queries sees",
    "past": "bool [B, S], the tokens that are to be scored: neither padding nor among the last W",
    "real": "bool [B, S], all tokens but padding",
    "scale": "factor of the logits",
    "softcap": "bound of the logits, or None",
    "sinks": "[H], a logit of each head beside those of the tokens, or None",
}
"""Arguments that a score may ask for -> their contents."""


@dataclass(frozen=True, kw_only=True)
class CacheCut:
    """A rule for what stays in a layer's cache."""

    name: str
    score: Callable[..., Any] | str
    """`(names out of GIVEN, **arguments) -> fp32 [B, G, S]`, or its "module:function", imported when it is first run."""
    capacity: Callable[..., int]
    """`(tokens, **arguments)`, or `(tokens, layer, layers, **arguments)`: how many of a row's tokens stay."""
    reads: tuple[str, ...]
    """Names out of `GIVEN`, in the order of the score's parameters."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that a schedule may give, with their values where it does not."""

    def __hash__(self) -> int:
        return hash((self.name, self.score))

    @cached_property
    def by_layer(self) -> bool:
        """The capacity depends on the layer."""
        return "layer" in inspect.signature(self.capacity).parameters

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The score function, imported."""
        if not isinstance(self.score, str):
            return self.score
        module, _, name = self.score.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    @cached_property
    def scored_by(self) -> tuple[str, ...]:
        """Names of the arguments that the score function takes."""
        parameters = inspect.signature(self.function).parameters
        return tuple(name for name in self.defaults if name in parameters)


RETROACTIVE = "retroactive"
"""Name of the cut that is no score: caches of earlier layers keep what outlives a prune."""
CACHE_CUTS: Registry[CacheCut] = Registry("cache", default="")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A cache cut with its arguments, as a schedule names it."""

    rule: CacheCut
    arguments: tuple[tuple[str, Any], ...]
    """All of the rule's arguments, in its order."""

    @cached_property
    def window(self) -> int:
        """How many of the last tokens of a row stay in any case."""
        return int(dict(self.arguments).get("window", 0))

    @cached_property
    def score_arguments(self) -> dict[str, Any]:
        """Keywords of the score function."""
        return {name: value for name, value in self.arguments if name in self.rule.scored_by}

    def kept(self, tokens: int, layer: int, layers: int) -> int:
        """Count the tokens that a layer's cache keeps of a row's: all of them where there is room."""
        place = {"layer": layer, "layers": layers} if self.rule.by_layer else {}
        wanted = self.rule.capacity(tokens, **place, **dict(self.arguments))
        return min(tokens, max(wanted, self.window))

    def __str__(self) -> str:
        return call_text(self.rule.name, dict(self.arguments))


@dataclass(frozen=True, kw_only=True)
class Retroactive:
    """The cut of caches behind a prune: those of earlier layers keep the tokens that outlive it."""

    layer: int
    """The filter layer."""
    first: int
    """The first layer whose cache is cut."""

    def __str__(self) -> str:
        return call_text(RETROACTIVE, {"layer": self.layer, "first": self.first})


def cache_cut(text: str) -> Cut | Retroactive:
    """Read "snapkv(window=32,capacity=256)", or "retroactive(layer=16,first=1)".

    Raises:
        ScheduleError: no such rule, or arguments that it does not take.
    """
    if name_in(text) == RETROACTIVE:
        return _retroactive(text)
    return _cut(text, CACHE_CUTS[name_in(text)])  # registered now, whatever was before


@lru_cache(maxsize=256)
def _retroactive(text: str) -> Retroactive:
    given = checked_arguments("cache", text, RETROACTIVE, {"layer": None, "first": 0})
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ScheduleError(f"cache={text!r}: {name}={value!r} is no layer; use an int >= 0")
    if given["first"] >= given["layer"]:
        raise ScheduleError(
            f"cache={text!r}: first={given['first']} is not before layer={given['layer']}, so that no cache is cut; "
            f"use a first layer below {given['layer']}"
        )
    return Retroactive(**given)


@lru_cache(maxsize=256)
def _cut(text: str, rule: CacheCut) -> Cut:
    arguments = checked_arguments("cache", text, rule.name, rule.defaults)
    found = Cut(rule=rule, arguments=tuple(arguments.items()))
    try:  # for the checks of the arguments
        kept = found.kept(_MANY, 0, _LAYERS)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ScheduleError(f"cache={text!r}: {error}") from None
    if not isinstance(kept, int) or kept < 1:
        raise ScheduleError(f"cache={text!r}: {rule.name} would keep {kept!r} of {_MANY} tokens")
    return found


def register_cache_cut(name: str, *, capacity: Callable[..., int]) -> Callable[[F], F]:
    """Register the decorated score function as a cache cut; its keywords with defaults are the arguments.

    An argument `window` says how many of the last tokens of a row stay in any case, and are the queries of the score.

    Args:
        capacity: `(tokens of a row, **arguments) -> tokens that stay`, or with `layer` and `layers` behind the tokens;
            raises ValueError for a bad argument.

    Raises:
        ScheduleError: the name is taken, or the function asks for something that nothing provides.
    """

    def register(function: F) -> F:
        CACHE_CUTS.add(name, _rule(name, function, function, capacity))
        return function

    return register


def _rule(
    name: str, score: Callable[..., Any] | str, like: Callable[..., Any], capacity: Any
) -> CacheCut:
    parameters = inspect.signature(like).parameters.values()
    reads = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    unknown = [read for read in reads if read not in GIVEN]
    if unknown:
        raise ScheduleError(
            f"cache cut {name!r} asks for {', '.join(unknown)}, which nothing provides; it may ask for "
            f"{', '.join(GIVEN)}, and take arguments by keyword"
        )
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return CacheCut(name=name, score=score, capacity=capacity, reads=reads, defaults=defaults)
