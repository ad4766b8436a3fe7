"""Schedules: at which decoder layers vision tokens enter, are pruned, and leave.

    for k, layer in enumerate(layers):              # 0-based; an event happens at layer k's *input*
        if k == schedule.inject: hidden = insert(hidden, vision)
        if k in schedule.prune:  hidden = keep_best(hidden, schedule.prune[k])
        if k == schedule.exit:   hidden = drop_vision(hidden)
        hidden = layer(hidden)

A `Schedule` knows nothing of a model; `validate` and `keep_counts` hold it against one. Its fields and what can be asked of it are
here; checks are in `values.py` and `checks.py`, arithmetic in `counts.py` and `pyramid.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import (
    METHODS,
    POSITION_RULES,
    RANKS,
    SCORERS,
    SELECTIONS,
    PositionRule,
    Scorer,
)
from hidrop_fx.methods.cache_cuts import Cut, Retroactive, cache_cut
from hidrop_fx.methods.call_text import call_text, parse_call
from hidrop_fx.methods.reducers import Reduction, reduction
from hidrop_fx.methods.scoring import PROMPT, scored_without_question
from hidrop_fx.schedule.checks import check_depth, check_order, check_rules
from hidrop_fx.schedule.counts import entering_tokens, prune_counts
from hidrop_fx.schedule.keeps import PruneCount
from hidrop_fx.schedule.presets import PRESET_LAYERS, PUBLISHED, preset_fields, warn_if_scaled
from hidrop_fx.schedule.pyramid import TAIL, concave_keeps
from hidrop_fx.schedule.text import GRAMMAR, is_file, json_fields, parse_fields, read_text, written
from hidrop_fx.schedule.values import check_values

SCORES: tuple[str, ...] = tuple(SCORERS)
"""Names of the scorers that are there from the start; `hidrop_fx.register_scorer` adds others."""
POSITIONS: tuple[str, ...] = tuple(POSITION_RULES)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The decoder layers at which vision tokens enter, are pruned and leave, and the rules for it.

    `inject <= every prune layer < exit <= number of layers`, and keeps never grow. All values are
    checked when the schedule is made; `Schedule()` is the untouched model.
    """

    inject: int = 0
    """The first layer that sees vision tokens; 0 means from the start."""

    prune: Mapping[int, int | float] = field(default_factory=dict)
    """Filter layer -> how many vision tokens it and the layers after it see: an int is tokens per
    image or video (see `per`), a float in (0, 1] a fraction of the sample's vision tokens. Stored as `Keeps`."""

    per: str = "item"
    """What an int keep counts: tokens per "item" as the user gave it, an image with all its tiles or a video with
    all its frames; per "tile" of an image; per "frame" of a video; or per "sample", whatever it holds."""

    exit: int | None = None
    """The first layer without vision tokens; None, or the number of layers, means never."""

    before: str | None = None
    """What becomes of an image's tokens before the decoder sees them, such as "divprune(ratio=0.098)": a
    reducer and its arguments. The events above work on what it leaves."""

    reads: tuple[int, ...] | None = None
    """Layers at which text attends to vision tokens that no layer updates: projected features, to the end. Vision
    tokens are rows of no layer then, and there is nothing to inject, prune or let exit (ViCA)."""

    freeze_system: bool = False
    """With `reads`: no layer's attention updates the text before a prompt's first vision token; its MLPs do."""

    bottleneck: int | None = None
    """Id of the tokens of a prompt, behind its images, through which all text behind them sees those: it sees nothing before
    the first of them, and no cache holds anything before it (VoCo-LLaMA). A row without such tokens is as without it."""

    cache: str | None = None
    """What each layer's KV cache keeps of the prompt once it is read, such as "snapkv(window=32,capacity=256)": a
    cache cut and its arguments. Prefill is as without it; the tokens that follow see what was kept."""

    score: str = SCORERS.default
    """The rule by which each filter layer scores vision tokens, of those that are registered: "last_token", the
    attention of the last prompt token (in training of every position just before an answer, averaged),
    "all_text", "previous_layer", "state_change", "random" and others; `SCORERS[name].description` says what each
    is. `hidrop_fx.register_scorer` adds rules of your own."""

    scoring: str = PROMPT
    """"prompt": scores depend on the prompt's text, as `score` says. "agnostic": each image is scored by its own last token that
    is still there, and nothing behind the image counts, so that a later question finds what it needs."""

    positions: str = POSITION_RULES.default
    """The rule by which tokens are numbered for RoPE once some are missing: one of `POSITIONS`."""

    deepstack: str = "at_inject"
    """Of a model that adds features of tower layers to its vision tokens between the first layers (Qwen3-VL): what a
    token gets that enters behind some of them. "at_inject": their sum, as it enters; "skip": nothing of them."""
    rounding: str = "half_up"
    """The rule by which a keep that is a fraction becomes a number of tokens: "half_up", "half_even" (as
    Python's `round`) or "floor" (as its `int`)."""

    selection: str = SELECTIONS.default
    """"hard" keeps what `prune` says. "dtopk" learns in training which share of its tokens each filter
    layer drops, starting from `prune` (HiDrop's differentiable top-k)."""

    rank: str = RANKS.default
    """For "dtopk": with "soft" ranks the scores get gradients too, not the shares alone."""

    budget_weight: float = 1.0
    """For "dtopk": weight of the loss term that holds the average number of tokens at `prune`'s."""

    merge: str | None = None
    """What becomes of the tokens that a filter layer drops. None: they are lost. "nearest_key": each goes into the
    vision token of its row that stays and whose key in that layer is nearest to its own; the mean of all that go
    there takes that token's place. "recycle": the best 30 % become a few tokens more, means of their clusters, behind the
    last that stays; a keep does not count those (SparseVLM)."""

    average: int | float | None = None
    """Vision tokens of an image that a layer sees on average, over all layers: with one filter layer and an exit it says
    what the former keeps, `ceil((layers * average - (filter layer - inject) * N) / (exit - filter layer))` of N. Its
    entry in `prune` is 1.0 then (TwigVLM)."""

    def __post_init__(self) -> None:
        check_values(self)
        check_rules(self)
        check_order(self)

    @property
    def scorer(self) -> Scorer:
        """The rule that is registered as `score`, with the rows that `scoring` says."""
        found = SCORERS[self.score]
        return found if self.scoring == PROMPT else scored_without_question(found)

    @property
    def reduction(self) -> Reduction | None:
        """The rule that is registered as `before`, with its arguments; None if there is none."""
        return None if self.before is None else reduction(self.before)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules beside the model's own that it reads, which `compile` is given."""
        found = self.reduction
        name = None if found is None else found.reducer.module
        return (*(() if name is None else (name,)), *(self.scorer.modules if self.prune else ()))

    @property
    def position_copies(self) -> int:
        """How many position ids a token bears on each axis: more than one where a reducer merges tokens and keeps all."""
        found = self.reduction
        return 1 if found is None else found.copies

    @property
    def decides_by_pixels(self) -> bool:
        """True if how many tokens of an image stay before the decoder follows from its pixels, and is known in a call."""
        found = self.reduction
        return found is not None and found.reducer.module is not None

    @property
    def cut(self) -> Cut | None:
        """The rule that is registered as `cache`, with its arguments; None if there is none."""
        found = None if self.cache is None else cache_cut(self.cache)
        return found if isinstance(found, Cut) else None

    @property
    def retroactive(self) -> Retroactive | None:
        """The filter layer whose survivors are all that the caches of earlier layers keep, where `cache` names one."""
        found = None if self.cache is None else cache_cut(self.cache)
        return found if isinstance(found, Retroactive) else None

    @property
    def position_rule(self) -> PositionRule:
        """The rule that is registered as `positions`."""
        return POSITION_RULES[self.positions]

    @property
    def learns(self) -> bool:
        """Training learns how many tokens the filter layers keep."""
        return SELECTIONS[self.selection].learns

    @property
    def soft_ranks(self) -> bool:
        """Scores get gradients from a learned selection."""
        return RANKS[self.rank].differentiable

    @property
    def identity(self) -> bool:
        """True if nothing at all happens, at any depth: no event, and HF's own position ids.

        `exit=num_layers` and a keep of 1.0 remove no token either, but they are events: the depth is
        not known here, and a filter layer scores whatever it keeps. "group" renumbers the text.
        """
        return self.cache is None and self.whole_prefill

    @property
    def whole_prefill(self) -> bool:
        """True if the prompt runs as under `Schedule()`, whatever its cache keeps."""
        return (
            self.inject == 0
            and self.before is None
            and not self.prune
            and self.exit is None
            and self.reads is None
            and self.bottleneck is None
            and not self.position_rule.renumbers_text
        )

    def validate(self, num_layers: int) -> None:
        """Raise `ScheduleError` unless every event lies within a model of `num_layers` layers."""
        check_depth(self, num_layers)

    def with_keeps(self, prune: Mapping[int, int | float]) -> "Schedule":
        """Return this schedule with other keeps, which nothing learns.

        Caches that follow a prune, and merging, go with the filter layers that they are about.
        """
        follows = self.retroactive
        cache = None if follows is not None and follows.layer not in prune else self.cache
        return replace(
            self,
            prune=prune,
            average=None,
            cache=cache,
            merge=self.merge if prune else None,
            selection=SELECTIONS.default,
            rank=RANKS.default,
            budget_weight=1.0,
        )

    def keep_counts(
        self,
        vision_tokens: int,
        images: int = 1,
        units: int | None = None,
        *,
        num_layers: int | None = None,
    ) -> dict[int, int]:
        """Count the vision tokens left at each filter layer, for a sample with so many tokens and images.

        `units` are its tiles or frames, where `per` says so; None for as many as images. `num_layers` is the depth that
        an `average` is over.

        Never more than are still there, so a keep that asks for more than the one before (an int
        after a float, say) changes nothing.

        Raises:
            ScheduleError: `average` leaves a filter layer less than nothing, or asks for more than there is.
        """
        found = self.prune_counts(vision_tokens, images, units, num_layers=num_layers)
        return {layer: count.left for layer, count in found.items()}

    def prune_counts(
        self,
        vision_tokens: int,
        images: int = 1,
        units: int | None = None,
        *,
        num_layers: int | None = None,
    ) -> dict[int, PruneCount]:
        """Count what stays of a sample's vision tokens at each filter layer, what is merged and what is added.

        As `keep_counts`, which counts what is left.
        """
        return prune_counts(self, vision_tokens, images, units, num_layers)

    def entering_tokens(self, vision_tokens: int, images: int = 1) -> int:
        """Count the vision tokens that reach the decoder, of a sample whose images have as many tokens each.

        Raises:
            ScheduleError: an image has fewer tokens than the reducer is to leave, or none that it can reduce.
        """
        return entering_tokens(self, vision_tokens, images)

    @classmethod
    def preset(cls, name: str, num_layers: int | None = None, **arguments: Any) -> "Schedule":
        """Return a published schedule by name (`PRESETS`), and by a method's own parameters.

            Schedule.preset("hidrop-64")
            Schedule.preset("fastv", layer=2, keep=0.5)

        HiDrop's were found for LLaVA-1.5-7B with 32 layers. For another depth every layer becomes
        `round(layer * num_layers / 32)`, halves up; events that would fall together move apart, in
        order. A logged warning tells the resulting layers. Methods' layers are what they are.

        Raises:
            ScheduleError: no such preset or argument, or a layer that a model of `num_layers` layers does
                not have.
        """
        given = preset_fields(name, arguments, num_layers)
        try:
            schedule = cls(**given)
        except ScheduleError as error:  # which speaks of fields, not of the preset's arguments
            raise ScheduleError(f"{call_text(name, arguments)}: {error}") from None
        if name in METHODS and num_layers is not None:
            schedule.validate(num_layers)
        warn_if_scaled(name, schedule, num_layers)
        return schedule

    @classmethod
    def concave(
        cls,
        *,
        inject: int,
        exit: int,
        filters: Sequence[int],
        average: float,
        tail: Sequence[int] = TAIL,
        num_layers: int = PRESET_LAYERS,
        vision_tokens: int = 576,
        score: str = SCORERS.default,
        positions: str = POSITION_RULES.default,
    ) -> "Schedule":
        """Make a concave pyramid as the authors do theirs: the first keep is what the budget leaves.

            Schedule.concave(inject=8, exit=24, filters=(10, 14, 16, 18), average=64)  # = hidrop-64

        Args:
            filters: filter layers, ascending, one more than `tail` has entries.
            average: vision tokens a layer over all `num_layers`; the head is rounded to the nearest
                token, halves up, so the schedule's own average may differ by up to
                `(filters[1] - filters[0]) / (2 * num_layers)`.
            tail: tokens per image that the filter layers after the first keep.
            vision_tokens: of one image.

        Raises:
            ScheduleError: layers out of order, or no head reaches the average; says which are in reach.
        """
        prune = concave_keeps(
            inject=inject,
            exit=exit,
            filters=filters,
            tail=tail,
            average=average,
            num_layers=num_layers,
            vision_tokens=vision_tokens,
        )
        schedule = cls(inject=inject, prune=prune, exit=exit, score=score, positions=positions)
        schedule.validate(num_layers)
        return schedule

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> "Schedule":
        """Read "inject=8,prune=10:215+14:10,exit=24", "fastv(layer=2,keep=0.5)", a preset's name, or a JSON file.

        With `num_layers` a preset is scaled to that depth, anything else is validated against it.
        """
        if not isinstance(text, str):
            raise ScheduleError(f"a schedule as text must be a str, not {text!r}: {GRAMMAR}")
        text = text.strip()
        if text in PUBLISHED or text in METHODS or text == "identity":
            return cls.preset(text, num_layers)
        call = parse_call(text)
        if call is not None:
            name, arguments = call
            return cls.preset(name, num_layers, **arguments)
        if text.endswith(".json") or (text and "=" not in text and is_file(text)):
            schedule = cls._of_file(text)
        else:
            schedule = cls(**parse_fields(text))
        if num_layers is not None:
            schedule.validate(num_layers)
        return schedule

    @classmethod
    def _of_file(cls, path: str) -> "Schedule":
        text = read_text(path)
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"in {path!r}: {error}") from error

    def __str__(self) -> str:
        """Write the form that `parse` reads; what is at its default is left out."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        unset: dict[str, Any] = {
            f.name: {} if f.name == "prune" else f.default for f in fields(self)
        }
        parts = [f"{n}={written(v)}" for n, v in given.items() if v != unset[n]]
        return ",".join(parts) or "identity"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as what JSON can hold; the layers of `prune` become strings."""
        prune = {str(layer): keep for layer, keep in self.prune.items()}
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"prune": prune}

    def to_json(self) -> str:
        """Write one line of JSON that `from_json` reads back as an equal schedule."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Read what `to_json` wrote. What is missing has its default; unknown keys are errors."""
        example = cls(inject=8, prune={10: 215}, exit=24).to_json()
        return cls(**json_fields(text, [f.name for f in fields(cls)], example))
