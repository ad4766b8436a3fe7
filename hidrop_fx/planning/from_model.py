"""Costs of a schedule from a model, its config or sizes alone: `hidrop_fx.plan`."""

import logging
from typing import Any

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.planning.cluster import Cluster
from hidrop_fx.planning.costs import Costs, Sample
from hidrop_fx.planning.geometry import (
    Geometry,
    largest_image,
    sizes_of,
    sparse_parts,
    vision_tokens_per_image,
    with_defaults,
)
from hidrop_fx.planning.plan import Plan
from hidrop_fx.schedule import Schedule, checked_int, keep_count

DEFAULT_TEXT_TOKENS = 64
"""LLaVA-1.5's system prompt and a short question."""

logger = logging.getLogger("hidrop_fx")


def plan(
    schedule: Schedule | str,
    model: Any = None,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    vision_tokens: int | None = None,
    text_tokens: int = DEFAULT_TEXT_TOKENS,
    images: int = 1,
    units: int | None = None,
    entering_tokens: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    dtype_bytes: int | None = None,
    twig_layers: int | None = None,
    batch_size: int = 1,
    new_tokens: int = 0,
    world_size: int | None = None,
    strategy: str | None = None,
    bandwidth: float | str | None = None,
    node_size: int | None = None,
    node_bandwidth: float | str | None = None,
) -> Costs:
    """Work out what a schedule (or its text form) costs for a model, or for the sizes given.

    What is not given is read from `model`, a Hugging Face model or its config; keywords win over it. Where images
    vary in their number of tokens (Pixtral's tower), `vision_tokens` is by default that of the largest.
    `vision_tokens` is the total over a sample's `images`, `units` the number of its tiles or frames where the
    schedule keeps tokens per tile or frame (by default each image is one), `entering_tokens` what a reducer left
    of them (by default what it leaves of images of one size), `text_tokens` the length of its text stream. Without a model, `num_layers`, `hidden_size`, `intermediate_size` and `vision_tokens` are
    needed, and the rest defaults to: heads of `head_dim` or else 128 (a single head where they do not
    divide the hidden size), as many key-value heads as heads, no output head, 2 bytes a number, 3 layers of a side branch.

    With `world_size`, also the time of a training step on so many GPUs, of which each has `batch_size` rows:
    `Costs.scale_out`. `strategy`, `bandwidth`, `node_size` and `node_bandwidth` are fields of `Cluster`, which has the rest of
    what is assumed: `plan(...).across(Cluster(...))`.
    """
    cluster = _cluster(world_size, strategy, bandwidth, node_size, node_bandwidth)
    given = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "dtype_bytes": dtype_bytes,
        "twig_layers": twig_layers,
    }
    sizes = {} if model is None else sizes_of(model)
    sizes |= {name: value for name, value in given.items() if value is not None}
    images = checked_int(images, "images", minimum=0)
    if vision_tokens is None and model is not None:
        per_image = vision_tokens_per_image(model) or _of_the_largest_image(model)
        vision_tokens = None if per_image is None else per_image * images

    needed = {name: sizes.get(name) for name in ("num_layers", "hidden_size", "intermediate_size")}
    needed["vision_tokens"] = vision_tokens
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        source = "no model is given" if model is None else f"{type(model).__name__} does not tell"
        raise ScheduleError(
            f"plan() is missing {', '.join(missing)} ({source}): pass "
            f"{', '.join(name + '=...' for name in missing)}" + (" or a model" * (model is None))
        )
    geometry = Geometry(**with_defaults(sizes))

    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, geometry.num_layers)
    elif not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule={schedule!r} is a {type(schedule).__name__}: use a Schedule or its text form"
        )
    sample = Sample(
        text_tokens=checked_int(text_tokens, "text_tokens", minimum=1),
        vision_tokens=checked_int(vision_tokens, "vision_tokens", minimum=0),
        images=images,
        units=None if units is None else checked_int(units, "units", minimum=0),
        entering=None
        if entering_tokens is None
        else checked_int(entering_tokens, "entering_tokens", minimum=0),
        batch_size=checked_int(batch_size, "batch_size", minimum=1),
        new_tokens=checked_int(new_tokens, "new_tokens", minimum=0),
    )
    made = Costs(
        plan=Plan.of(schedule, geometry.num_layers),
        geometry=geometry,
        sample=sample,
        cluster=cluster,
    )
    _ = made.segment_vision_tokens, made.scale_out  # so that what cannot be counted is refused here
    _warn_of_clamped_keeps(made)
    if model is not None and sparse_parts(model):
        logger.warning(
            "%s has %s: FLOPs, bytes and the KV cache are counted as if every layer had a dense MLP of width %d and "
            "%d key-value heads of %d. Token counts hold",
            type(model).__name__,
            " and ".join(sparse_parts(model)),
            geometry.intermediate_size,
            geometry.num_key_value_heads,
            geometry.head_dim,
        )
    return made


def _cluster(
    world_size: int | None,
    strategy: str | None,
    bandwidth: float | str | None,
    node_size: int | None,
    node_bandwidth: float | str | None,
) -> Cluster | None:
    given: dict[str, Any] = {
        "strategy": strategy,
        "bandwidth": bandwidth,
        "node_size": node_size,
        "node_bandwidth": node_bandwidth,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if world_size is not None:
        return Cluster(world_size=world_size, **given)
    if given:
        raise HidropError(
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())} is about several GPUs: pass world_size=..., too"
        )
    return None


def _of_the_largest_image(model: Any) -> int | None:
    tokens = largest_image(model)
    if tokens is not None:
        logger.info(
            "images of this model vary in their number of tokens; costs are those of the largest, %d tokens. Pass "
            "vision_tokens=... for another",
            tokens,
        )
    return tokens


def _warn_of_clamped_keeps(costs: Costs) -> None:
    """Log where tokens and fractions, mixed in one schedule, ask for more than are left."""
    sample = costs.sample
    if costs.schedule.scorer.most is not None or costs.schedule.average is not None:
        # Which say themselves how many stay.
        return
    for event in costs.plan.of_kind("prune"):
        assert event.keep is not None
        left = costs.segment_vision_tokens[event.name]
        units = sample.images if sample.units is None else sample.units
        units = min(1, sample.images) if costs.schedule.per == "sample" else units
        wanted = keep_count(
            event.keep, costs.entering_vision_tokens, units, costs.schedule.rounding
        )
        if wanted > left:
            logger.warning(
                "prune layer %d keeps %s, %d of %d vision tokens, but only %d are left there: it "
                "removes nothing",
                event.layer,
                event.keep,
                wanted,
                costs.entering_vision_tokens,
                left,
            )
