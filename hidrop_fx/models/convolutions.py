"""Check that a schedule leaves the layers of a decoder that convolve, and do not attend, what they need.

A convolution sees the tokens of its layer and no others, in the prompt and behind it: those that a schedule has there, for
the whole of a sequence. So tokens may enter, be pruned and leave at its input as at any other. What takes a token
away behind the layer that saw it, or asks the layer for attention, is refused.
"""

from typing import Any

from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.methods import MERGES, SCORERS
from hidrop_fx.ops.convolution import CONVOLUTION
from hidrop_fx.planning import Event, Plan

_OF_ATTENTION = {"query", "key", "value", "cos", "sin", "scale"}
_PREVIOUS = "previous_"


def convolution_layers(model: Any) -> frozenset[int]:
    """Return the layers of a model's (or config's) text decoder that convolve."""
    config = getattr(model, "config", model).get_text_config()
    types = getattr(config, "layer_types", None) or ()
    return frozenset(k for k, name in enumerate(types) if name == CONVOLUTION)


def kept_by_convolutions(model: Any) -> tuple[int, ...]:
    """Return by layer the last tokens that its cache keeps: one less than a kernel is wide, 0 for layers that attend."""
    found = convolution_layers(model)
    config = model.config.get_text_config()
    kept = config.conv_L_cache - 1 if found else 0
    return tuple(kept * (k in found) for k in range(config.num_hidden_layers)) if found else ()


def check_convolutions(model: Any, plan: Plan) -> None:
    """Check that no convolution is to lose a token that it saw, nor to score tokens.

    Raises:
        UnsupportedModelError: the schedule cuts caches that a convolution reads, or lets text read frozen tokens there.
        ScheduleError: it scores by the attention of a layer that has none.
    """
    found = convolution_layers(model)
    if not found:
        return
    schedule, name = plan.schedule, type(model).__name__
    if schedule.cut is not None:
        raise _loses(f"cache={str(schedule.cut)!r}", name, found)
    if schedule.bottleneck is not None:
        raise _loses(f"bottleneck={schedule.bottleneck}", name, found)
    behind = schedule.retroactive
    if behind is not None and found & set(range(behind.first, behind.layer)):
        raise _loses(f"cache={str(behind)!r}", name, found & set(range(behind.first, behind.layer)))
    reading = found & set(schedule.reads or ())
    if reading:
        raise UnsupportedModelError(
            f"reads={schedule.reads} lets text attend to frozen vision tokens, and {name} has convolutions (layers "
            f"{_listed(reading)}), which attend to nothing; leave them out of reads"
        )
    for event in plan.of_kind("prune"):
        _check_scores(event, name, found, plan.num_layers)


def _check_scores(event: Event, name: str, found: frozenset[int], layers: int) -> None:
    assert event.scorer is not None
    asked = set(SCORERS[event.scorer].parameters)
    here = asked & _OF_ATTENTION
    merge = event.option("merge")
    if merge is not None and MERGES[str(merge)].added is None:
        here.add(f"the keys of merge={merge!r}")
    before = {n for n in asked if n.removeprefix(_PREVIOUS) in _OF_ATTENTION} - here
    for layer, needs in ((event.layer, here), (event.layer - 1, before)):
        if layer in found and needs:
            attending = [k for k in range(layers) if k not in found]
            raise ScheduleError(
                f"prune layer {event.layer} scores by {event.scorer!r}, which reads {', '.join(sorted(needs))} of "
                f"layer {layer}, and that layer of {name} is a convolution; layers {_listed(attending)} attend"
            )


def _loses(what: str, name: str, layers: frozenset[int]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} takes tokens out of caches, and {name} has convolutions (layers {_listed(layers)}), which have "
        "seen them: what comes next would see others. Use inject, prune and exit"
    )


def _listed(layers: Any) -> str:
    return ", ".join(map(str, sorted(layers)))
