"""Check that a schedule leaves layers of a decoder that convolve, carry a state or see no other tokens what they need.

A convolution, and a recurrent state, see the tokens of their layer and no others, in the prompt and behind it: those that
a schedule has there, for the whole of a sequence, in their order. Each layer has a state of its own, so that tokens may
enter, be pruned and leave at its input as at any other. What takes a token away behind the layer that saw it, or asks the
layer for attention, is refused.
"""

from typing import Any

from hidrop_fx.capture.layers import tokenwise_layers
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.methods import MERGES, SCORERS
from hidrop_fx.ops.mixers import CONVOLUTION, HYBRID, RECURRENT
from hidrop_fx.planning import Event, Plan

_OF_ATTENTION = {"query", "key", "value", "cos", "sin", "scale"}
_PREVIOUS = "previous_"
_CONVOLUTIONS, _STATES, _TOKENS = "convolutions", "recurrent states", "MLPs alone"


def convolution_layers(model: Any) -> frozenset[int]:
    """Return the layers of a model's (or config's) text decoder that convolve."""
    return _layers_of_type(model, CONVOLUTION)


def recurrent_layers(model: Any) -> frozenset[int]:
    """Return the layers of a model's (or config's) text decoder that carry a state from token to token."""
    return _layers_of_type(model, RECURRENT) | _layers_of_type(model, HYBRID)


def _layers_of_type(model: Any, wanted: str) -> frozenset[int]:
    config = getattr(model, "config", model).get_text_config()
    types = getattr(config, "layer_types", None) or ()
    return frozenset(k for k, name in enumerate(types) if name == wanted)


def kept_by_convolutions(model: Any) -> tuple[int, ...]:
    """Return by layer the last tokens that its cache keeps: one less than a kernel is wide, 0 for layers that attend."""
    found = convolution_layers(model)
    config = model.config.get_text_config()
    kept = config.conv_L_cache - 1 if found else 0
    return tuple(kept * (k in found) for k in range(config.num_hidden_layers)) if found else ()


def check_layers_without_attention(model: Any, plan: Plan) -> None:
    """Check that no convolution and no recurrent state is to lose a token that it saw, nor to score tokens.

    Raises:
        UnsupportedModelError: the schedule cuts caches that such a layer reads, or lets text read frozen tokens there.
        ScheduleError: it scores by the attention of a layer that has none.
    """
    name, alone = type(model).__name__, _layers_of_type(model, RECURRENT)
    convolutions, states = convolution_layers(model), recurrent_layers(model)
    tokenwise = tokenwise_layers(model.config.get_text_config())
    for found, what in ((convolutions, _CONVOLUTIONS), (states, _STATES)):
        if found:
            _check_caches(found, what, name, plan)
    for found, what in ((convolutions, _CONVOLUTIONS), (states, _STATES), (tokenwise, _TOKENS)):
        _check_reads(found, what, name, plan)
    silent = ((convolutions, _CONVOLUTIONS), (alone, _STATES), (tokenwise, _TOKENS))
    attending = frozenset(range(plan.num_layers)) - convolutions - alone - tokenwise
    for event in plan.of_kind("prune"):
        for found, what in silent:
            _check_scores(event, name, what, found, attending)


def _check_caches(found: frozenset[int], what: str, name: str, plan: Plan) -> None:
    schedule = plan.schedule
    if schedule.cut is not None:
        raise _loses(f"cache={str(schedule.cut)!r}", name, what, found)
    if schedule.bottleneck is not None:
        raise _loses(f"bottleneck={schedule.bottleneck}", name, what, found)
    behind = schedule.retroactive
    if behind is not None and found & set(range(behind.first, behind.layer)):
        between = found & set(range(behind.first, behind.layer))
        raise _loses(f"cache={str(behind)!r}", name, what, between)


def _check_reads(found: frozenset[int], what: str, name: str, plan: Plan) -> None:
    reads = plan.schedule.reads
    reading = found & set(reads or ())
    if reading:
        raise UnsupportedModelError(
            f"reads={reads} lets text attend to frozen vision tokens, and {name} has {what} (layers "
            f"{_listed(reading)}), which attend to nothing; leave them out of reads"
        )


def _check_scores(
    event: Event, name: str, what: str, found: frozenset[int], attending: frozenset[int]
) -> None:
    assert event.scorer is not None
    asked = set(SCORERS[event.scorer].parameters)
    here = asked & _OF_ATTENTION
    merge = event.option("merge")
    if merge is not None and MERGES[str(merge)].added is None:
        here.add(f"the keys of merge={merge!r}")
    before = {n for n in asked if n.removeprefix(_PREVIOUS) in _OF_ATTENTION} - here
    for layer, needs in ((event.layer, here), (event.layer - 1, before)):
        if layer in found and needs:
            raise ScheduleError(
                f"prune layer {event.layer} scores by {event.scorer!r}, which reads {', '.join(sorted(needs))} of "
                f"layer {layer}, and {name} has {what} there; layers {_listed(attending)} attend"
            )


def _loses(change: str, name: str, what: str, layers: frozenset[int]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{change} takes tokens out of caches, and {name} has {what} (layers {_listed(layers)}), which have "
        "seen them: what comes next would see others. Use inject, prune and exit"
    )


def _listed(layers: Any) -> str:
    return ", ".join(map(str, sorted(layers)))
