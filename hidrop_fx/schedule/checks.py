"""Checks of a schedule's fields against each other, and against a model's depth.

check_rules(schedule)       # names are registered, and what they mean goes together
check_order(schedule)       # inject <= every prune layer < exit
check_depth(schedule, 32)   # every event lies within a model of so many layers
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import MERGES, POSITION_RULES, RANKS, SELECTIONS
from hidrop_fx.methods.scoring import SCORINGS
from hidrop_fx.schedule.keeps import ROUNDINGS, checked_int

if TYPE_CHECKING:
    from hidrop_fx.schedule.schedule import Schedule

DEEPSTACK: tuple[str, ...] = ("at_inject", "skip")
PER: tuple[str, ...] = ("item", "tile", "frame", "sample")


def check_rules(schedule: Schedule) -> None:
    """Check that every rule is known, and that they go together.

    Raises:
        ScheduleError: a name is unknown, or a field means nothing, or too much, to another.
    """
    if schedule.scoring not in SCORINGS:
        raise ScheduleError(
            f"unknown scoring={schedule.scoring!r}: choose one of {', '.join(SCORINGS)}"
        )
    scorer, rank = schedule.scorer, RANKS[schedule.rank]
    if schedule.before is not None and schedule.per in ("tile", "frame"):
        raise ScheduleError(
            f"per={schedule.per!r} counts {schedule.per}s, which before={schedule.before!r} does not leave whole; "
            "use per='item' or per='sample'"
        )
    found = schedule.reduction
    if found is not None and found.reducer.members and schedule.positions != POSITION_RULES.default:
        raise ScheduleError(
            f"positions={schedule.positions!r} numbers tokens anew, and before={schedule.before!r} gives each the ids of those "
            f"that it stands for; use positions={POSITION_RULES.default!r}"
        )
    if POSITION_RULES[schedule.positions].closes_gaps and schedule.before is None:
        raise ScheduleError(
            f"positions={schedule.positions!r} is about tokens that a stage before the decoder takes out, and there is "
            "none; give it one, such as before='divprune(ratio=0.098)', or use positions='persistent'"
        )
    if schedule.rounding not in ROUNDINGS:
        raise ScheduleError(
            f"unknown rounding={schedule.rounding!r}: choose one of {', '.join(ROUNDINGS)}"
        )
    SELECTIONS[schedule.selection]
    if schedule.per not in PER:
        raise ScheduleError(f"per={schedule.per!r}; use one of {', '.join(map(repr, PER))}")
    if schedule.deepstack not in DEEPSTACK:
        raise ScheduleError(
            f"deepstack={schedule.deepstack!r}; use one of {', '.join(map(repr, DEEPSTACK))}"
        )
    if not schedule.learns and (schedule.rank != RANKS.default or schedule.budget_weight != 1.0):
        raise ScheduleError(
            f"rank={schedule.rank!r}, budget_weight={schedule.budget_weight} mean nothing to "
            f"selection={schedule.selection!r}; use selection='dtopk', or leave them out"
        )
    if schedule.merge is not None:
        MERGES[schedule.merge]
        if not schedule.prune:
            raise ScheduleError(
                f"merge={schedule.merge!r} is about tokens that filter layers drop, but prune is empty; give it "
                "some, such as prune={10: 215}, or leave merge out"
            )
        if MERGES[schedule.merge].added is not None:
            _check_added(schedule)
    if schedule.learns and not schedule.prune:
        raise ScheduleError(
            f"selection={schedule.selection!r} learns how many tokens the filter layers keep, but prune "
            "is empty; give it the counts to start from, such as prune={10: 215}"
        )
    if scorer.most is not None and (
        schedule.learns or schedule.position_rule.renumbers_after_prunes
    ):
        raise ScheduleError(
            f"score={schedule.score!r} decides by itself how many tokens stay, which the host does not know: it cannot go "
            f"with selection={schedule.selection!r} and positions={schedule.positions!r}; use selection='hard', and "
            "positions='persistent' or 'group'"
        )
    if rank.differentiable and not scorer.differentiable:
        raise ScheduleError(
            f"score={schedule.score!r} has no gradient for rank={schedule.rank!r} to pass on; use "
            f"rank={RANKS.default!r}"
        )


def _check_added(schedule: Schedule) -> None:
    """Check that tokens which a merge adds have a place, and that the host knows how many there are."""
    for field in ("cache", "selection", "positions", "score", "average"):
        value = getattr(schedule, field)
        wrong = {
            "cache": schedule.retroactive is not None,
            "selection": schedule.learns,
            "positions": schedule.position_rule.renumbers_text,
            "score": schedule.scorer.most is not None,
            "average": schedule.average is not None,
        }
        if wrong[field]:
            raise ScheduleError(
                f"{field}={value!r} beside merge={schedule.merge!r}: a merge that adds tokens needs counts that the host "
                "knows, and its tokens were in no earlier cache and stand between image and text; leave one of the two "
                "out, or use merge='nearest_key'"
            )


def check_order(schedule: Schedule) -> None:
    """Check that vision tokens enter before they are pruned, and are pruned before they leave.

    Raises:
        ScheduleError: an event comes too early or too late, or a score needs a layer that has not run.
    """
    scorer = schedule.scorer
    _check_reads(schedule)
    _check_bottleneck(schedule)
    if schedule.exit is not None and schedule.inject >= schedule.exit:
        raise ScheduleError(
            f"inject={schedule.inject} is not before exit={schedule.exit}: no layer would ever see a "
            "vision token; use a smaller inject or a larger exit"
        )
    for layer in schedule.prune:
        if layer < schedule.inject:
            raise ScheduleError(
                f"prune layer {layer} lies before inject={schedule.inject}: there is nothing to "
                f"prune yet; move the entry to layer {schedule.inject} or later, or inject at "
                f"{layer} or earlier"
            )
        if schedule.exit is not None and layer >= schedule.exit:
            raise ScheduleError(
                f"prune layer {layer} is not before exit={schedule.exit}: nothing is left to "
                f"prune there; drop the entry or move it to layer {schedule.exit - 1} or earlier"
            )
        scorer.check(layer, schedule.inject)
    _check_retroactive(schedule)
    _check_average(schedule)


def check_depth(schedule: Schedule, num_layers: int) -> None:
    """Check that a model of `num_layers` layers has every layer that is named.

    Raises:
        ScheduleError: an event lies behind the last layer, or `num_layers` is no number of layers.
    """
    num_layers = checked_int(num_layers, "num_layers", minimum=1)
    last = num_layers - 1
    if schedule.inject > last:
        raise ScheduleError(
            f"inject={schedule.inject} but the model has {num_layers} layers, 0 to {last}: use "
            f"inject <= {last}"
        )
    for layer in schedule.prune:
        if layer > last:
            raise ScheduleError(
                f"prune layer {layer} but the model has {num_layers} layers, 0 to {last}: drop "
                f"the entry or move it to layer {last} or earlier"
            )
    for layer in schedule.reads or ():
        if layer > last:
            raise ScheduleError(
                f"reads layer {layer} but the model has {num_layers} layers, 0 to {last}: drop it"
            )
    if schedule.exit is not None and schedule.exit > num_layers:
        raise ScheduleError(
            f"exit={schedule.exit} but the model has {num_layers} layers: use exit <= "
            f"{num_layers}, or None for never"
        )


def _check_average(schedule: Schedule) -> None:
    """Check that an average over the layers leaves one number open, that of the filter layer."""
    if schedule.average is None:
        return
    if len(schedule.prune) != 1 or schedule.exit is None or list(schedule.prune.values()) != [1.0]:
        raise ScheduleError(
            f"average={schedule.average} says what one filter layer keeps in front of an exit, and there are prune="
            f"{dict(schedule.prune)!r} and exit={schedule.exit}; write average={schedule.average} with prune={{2: 1.0}} "
            "and exit=24, say, or leave average out"
        )
    if schedule.learns or schedule.scorer.most is not None:
        raise ScheduleError(
            f"average={schedule.average} fixes how many tokens stay, which selection={schedule.selection!r} or score="
            f"{schedule.score!r} decides by itself; use a count or a share in prune, and leave average out"
        )


def _check_retroactive(schedule: Schedule) -> None:
    """Check that the caches of earlier layers follow a prune, of tokens that are there."""
    cut = schedule.retroactive
    if cut is None:
        return
    if cut.layer not in schedule.prune:
        raise ScheduleError(
            f"cache={schedule.cache!r}: nothing is pruned at layer {cut.layer}; name one of the filter layers "
            f"{list(schedule.prune)}"
        )
    if cut.first < schedule.inject:
        raise ScheduleError(
            f"cache={schedule.cache!r}: the cache of layer {cut.first} holds no vision token, since they enter at "
            f"layer {schedule.inject}; use first={schedule.inject} or later"
        )


def _check_bottleneck(schedule: Schedule) -> None:
    """Check that nothing is asked of text that does not see the images."""
    if schedule.bottleneck is None:
        return
    given = {"prune": dict(schedule.prune), "reads": schedule.reads, "cache": schedule.cache}
    for name, value in given.items():
        if value:
            raise ScheduleError(
                f"{name}={value!r} beside bottleneck={schedule.bottleneck}: text behind those tokens sees no image, so "
                "that it can neither score nor read one, and caches begin at the first of them; leave one of the two "
                "out. before=, inject= and exit= go with it"
            )


def _check_reads(schedule: Schedule) -> None:
    """Check that nothing is asked of vision tokens that are rows of no layer."""
    if schedule.reads is None:
        if schedule.freeze_system:
            raise ScheduleError(
                "freeze_system=True keeps text as frozen vision tokens are kept, and there are none; "
                "name the layers that read them, as reads=(0, 1, 7), or leave it out"
            )
        return
    events = {"inject": schedule.inject, "prune": dict(schedule.prune), "exit": schedule.exit}
    for name, value in events.items():
        if value:
            raise ScheduleError(
                f"{name}={value!r} beside reads={schedule.reads!r}: no layer updates vision tokens, which only "
                "text reads at those layers, so that none enters, is pruned or leaves; leave one of the two out. "
                "before= may reduce them"
            )
    if schedule.cache is not None:
        raise ScheduleError(
            f"cache={schedule.cache!r} beside reads={schedule.reads!r}: a cut is scored by the queries of the last "
            "tokens, and vision tokens that are only read have none; leave one of the two out"
        )
    if schedule.positions != POSITION_RULES.default:
        raise ScheduleError(
            f"positions={schedule.positions!r} beside reads={schedule.reads!r}: tokens keep their ids where some "
            f"layers read all of them; use positions={POSITION_RULES.default!r}"
        )
