"""The table of scorers, and how one gets into it.

    @register_scorer("key_norm")
    def key_norm(key):                      # [B, G, S, d], the filter layer's keys
        return -key.float().norm(dim=-1).mean(dim=1)          # fp32 [B, S], the highest stay

    Schedule(prune={2: 0.5}, score="key_norm")

The parameters of a score function say what it needs (`methods/needs.py`); its keywords with defaults are arguments that a
schedule may give, score="key_norm(power=2)". Schedule text, JSON, saving, `compare`, calibration and the count of FLOPs
follow from the registration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.call_text import call_text, checked_arguments, name_in
from hidrop_fx.methods.needs import GIVEN, NEEDS, OPTIONAL, Widths, scoring_cost
from hidrop_fx.methods.queries import Queries, last_prompt_token

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Score = Callable[..., "Tensor"]
F = TypeVar("F")
Cost = Callable[[int, int, Widths], int]


class Registry(Mapping[str, T], Generic[T]):
    """Objects by name, in the order in which they were registered; one of them is the default."""

    def __init__(self, field: str, *, default: str, remedy: str = "") -> None:
        self._field, self._remedy = field, remedy
        self.default = default
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T, *, replace: bool = False) -> None:
        """Register an object.

        Raises:
            ScheduleError: the name is taken by another object, and `replace` is false.
        """
        known = self._entries.get(name)
        if known is not None and known != entry and not replace:
            raise ScheduleError(
                f"{self._field}={name!r} is registered already, as {known}: choose another name, or pass "
                "replace=True and compile again the models that use it"
            )
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget a name."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        """Look a name up.

        Raises:
            ScheduleError: nothing is registered under it.
        """
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ScheduleError(
                f"unknown {self._field}={name!r}: choose one of {', '.join(self)}{self._remedy}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Deferred:
    """A score function that is imported when a program is built, so that planning need not load torch."""

    path: str
    """"module:function"."""
    parameters: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Properties of a layer's softmax that follow as keywords where the layer has them."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keywords that a schedule may give, with their values where it does not."""

    @property
    def __name__(self) -> str:
        return self.path.rpartition(":")[2]

    def load(self) -> Score:
        """Import the function."""
        module, _, name = self.path.partition(":")
        function: Score = getattr(import_module(module), name)
        return function


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A rule that scores the tokens before a prune; the vision tokens with the highest scores stay.

    Two scorers are equal if name, functions and flags are; programs of unequal ones share no code.
    """

    name: str
    score: Score | Deferred
    """Plain tensor code, `(parameters by name) -> fp32 [B, S]`. It is traced and compiled."""
    queries: Queries = last_prompt_token
    """Rows that score, for a score function with `query` or `query_columns`."""
    averages_heads: bool = False
    """A score is the mean of what each head alone would give, so that processes which divide the heads average theirs. Otherwise
    queries, keys and values of all heads are brought together before they are scored."""
    differentiable: bool = True
    """Scores have gradients, which rank="soft" needs."""
    deterministic: bool = True
    """False: two runs score differently, so that `compare` has nothing to hold against."""
    summary: str = ""
    """One line on the rule; the first of the function's docstring if empty."""
    cost: Cost | None = None
    """Multiply-adds beyond those of the layer on its survivors: `(tokens, dropped, geometry) -> int`.
    None counts what `needs` cost."""
    most: Callable[[int], int] | None = None
    """How many of a row's vision tokens stay at most, for a rule that decides by itself which do: scores of the others are
    -inf, and fewer may stay. None: as many stay as the schedule says."""
    least_dropped: int = 0
    """How many vision tokens each prune drops of a row at least, whatever the schedule says."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Arguments that a schedule gives, out of `defaults`."""

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            if parameter not in GIVEN and parameter not in NEEDS:
                raise ScheduleError(
                    f"scorer {self.name!r}: nothing is known as {parameter!r}, a parameter of "
                    f"{_name(self.score)}; a score function may ask for {', '.join([*NEEDS, *GIVEN])}"
                )
        if not self.parameters:
            raise ScheduleError(
                f"scorer {self.name!r}: {_name(self.score)} has no parameter; give it `columns`, [B, S], or "
                f"any of {', '.join([*NEEDS, *GIVEN])}"
            )

    @cached_property
    def function(self) -> Score:
        """The score function, imported."""
        return self.score.load() if isinstance(self.score, Deferred) else self.score

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the score function's parameters, in order; those with a default keep it."""
        if isinstance(self.score, Deferred):
            return self.score.parameters
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        given = inspect.signature(self.score).parameters.values()
        return tuple(
            ("*" if p.kind in kinds else "") + p.name for p in given if p.default is p.empty
        )

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """Names of further parameters, for properties that only some layers have."""
        if isinstance(self.score, Deferred):
            return self.score.optional
        given = inspect.signature(self.score).parameters
        return tuple(name for name in OPTIONAL if name in given and name not in self.parameters)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Keywords of the score function that a schedule may give, with their values where it does not."""
        if isinstance(self.score, Deferred):
            return dict(self.score.arguments)
        given = inspect.signature(self.score).parameters.values()
        keywords = (p for p in given if p.kind is p.KEYWORD_ONLY and p.name not in OPTIONAL)
        return {p.name: p.default for p in keywords if p.default is not p.empty}

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """What the score function is called with beside its parameters."""
        return self.defaults | dict(self.arguments)

    def given(self, text: str) -> Scorer:
        """Return the scorer with the arguments of a text such as "gravity(heads=14)".

        Raises:
            ScheduleError: it does not take one of them.
        """
        name = name_in(text)
        arguments = checked_arguments("score", text, name, self.defaults)
        return replace(
            self, name=call_text(name, arguments), arguments=tuple(sorted(arguments.items()))
        )

    @cached_property
    def needs(self) -> frozenset[str]:
        """Tensors of the model among the parameters, out of `NEEDS`."""
        return frozenset(self.parameters) & NEEDS.keys()

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that make some of these tensors, which `compile` is given."""
        found = (NEEDS[name].module for name in sorted(self.needs))
        return tuple(dict.fromkeys(name for name in found if name is not None))

    @property
    def description(self) -> str:
        """One line on the rule, for tables."""
        return self.summary or (inspect.getdoc(self.function) or "").partition("\n")[0]

    def multiply_adds(self, tokens: int, dropped: int, model: Widths) -> int:
        """Count what scoring adds at a filter layer that drops `dropped` of `tokens` tokens."""
        if self.cost is not None:
            return self.cost(tokens, dropped, model)
        return scoring_cost(self.needs, tokens, dropped, model)

    def check(self, layer: int, inject: int) -> None:
        """Check that what the score needs is there at a filter layer.

        Raises:
            ScheduleError: no pass provides a need, or it is the layer before's, which has not run on the
                same tokens.
        """
        for name in sorted(self.needs):
            need = NEEDS[name]
            if not need.provided:
                provided = [known for known in NEEDS if NEEDS[known].provided]
                raise ScheduleError(
                    f"score={self.name!r} needs {name!r} ({need.contents}), which no pass provides yet; a "
                    f"score can be computed from {', '.join(provided)}"
                )
            if need.previous and layer <= inject:
                raise ScheduleError(
                    f"score={self.name!r} needs {name!r} of the layer before prune layer {layer}, but "
                    f"vision tokens enter at layer {inject}; prune at layer {inject + 1} or later"
                )

    def __str__(self) -> str:
        return f"{_name(self.score)}({', '.join(self.parameters)})"


class Scorers(Registry[Scorer]):
    """Scorers by name, or by a name with arguments."""

    def __getitem__(self, name: str) -> Scorer:
        """Look a scorer up, "gravity" or "gravity(heads=14)".

        Raises:
            ScheduleError: nothing is registered under it, or it does not take an argument.
        """
        if isinstance(name, str) and "(" in name:
            return _given(super().__getitem__(name_in(name)), name)
        return super().__getitem__(name)


@lru_cache(maxsize=256)
def _given(scorer: Scorer, text: str) -> Scorer:
    return scorer.given(text)


SCORERS = Scorers(
    "score",
    default="last_token",
    remedy="; or import what registers another one with hidrop_fx.register_scorer first",
)


def register_scorer(
    name: str,
    *,
    queries: Queries = last_prompt_token,
    averages_heads: bool = False,
    differentiable: bool = True,
    deterministic: bool = True,
    summary: str = "",
    cost: Cost | None = None,
    most: Callable[[int], int] | None = None,
    least_dropped: int = 0,
    replace: bool = False,
) -> Callable[[F], F]:
    """Register the decorated score function under a name that schedules may use.

    Define the function at the top level of a module, so that a dump can import it.

    Args:
        name: letters, digits, "_", "-" and "."; it stands in the text form of schedules.
        queries: which rows score, see `hidrop_fx.methods.queries`.
        averages_heads, differentiable, deterministic, summary, cost, most, least_dropped: as in `Scorer`.
        replace: take the place of another scorer of that name. Models that are compiled keep what was
            compiled; compile them again.

    Raises:
        ScheduleError: the name is taken or no such name, or a parameter of the function is unknown.
    """
    if not isinstance(name, str) or not name.replace("-", "_").replace(".", "_").isidentifier():
        raise ScheduleError(
            f"a scorer cannot be called {name!r}: use letters, digits, '_', '-' and '.'"
        )

    def register(score: F) -> F:
        if not callable(score) and not isinstance(score, Deferred):
            raise ScheduleError(
                f"scorer {name!r}: {score!r} is no function; decorate one with register_scorer({name!r})"
            )
        scorer = Scorer(
            name=name,
            score=score,
            queries=queries,
            averages_heads=averages_heads,
            differentiable=differentiable,
            deterministic=deterministic,
            summary=summary,
            cost=cost,
            most=most,
            least_dropped=least_dropped,
        )
        SCORERS.add(name, scorer, replace=replace)
        return score

    return register


def _name(score: Any) -> str:
    return getattr(score, "__qualname__", None) or getattr(score, "__name__", None) or repr(score)
