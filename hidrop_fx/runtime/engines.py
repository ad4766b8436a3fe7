"""What a prompt does where an engine holds the decoder: FSDP2 or ZeRO-3 shards it, tensor parallelism divides it, accelerate spreads it.

follow_division(runtime, scheduled)       # before the capture
follow_capture(runtime, capture)          # behind it

What does not go with an engine is left off, with a line of the log where it was asked for; processes that hold a decoder
together compare their schedules, at the first call and where the schedule changes.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.placement import Placement
from hidrop_fx.capture.sharded import mesh_of
from hidrop_fx.capture.zero3 import is_partitioned
from hidrop_fx.distributed.agreement import check_agreement
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.division import check_divided
from hidrop_fx.runtime.every_rank import check_gathered, check_schedule
from hidrop_fx.runtime.scheduled_model import ScheduledModel

if TYPE_CHECKING:
    from hidrop_fx.runtime.runtime import Runtime

SHARDED = "fully_shard or ZeRO-3 shards the model"
DIVIDED = "tensor parallelism divides the model"


def overlaps_no_tower(runtime: "Runtime") -> str | None:
    """Return why the vision tower runs before the decoder and not beside it; None where no engine is in the way."""
    store = runtime.programs.store
    if store.sharded or runtime.division is not None:
        return (
            f"{SHARDED if store.sharded else DIVIDED}: the vision tower runs before the decoder, not beside it, where its stream "
            "would race what the processes exchange"
        )
    if store.placement is not None:
        return f"the text decoder {store.placement}: the vision tower runs before it, not beside it"
    return None


def follow_division(runtime: "Runtime", scheduled: ScheduledModel) -> None:
    """Follow tensor parallelism: take away transformers' hooks on gradients, check the schedule and compare it.

    Raises:
        InputError: it reads what no process has.
        HidropError: the processes run different schedules.
    """
    if runtime.division is None:
        return
    _leave_graphs(runtime, DIVIDED)
    runtime.division.release_hooks()
    if runtime.programs.store.agreed is not runtime.plan:
        check_divided(scheduled)
        _agree(runtime, scheduled.decoder)


def follow_capture(runtime: "Runtime", capture: Capture) -> None:
    """Follow FSDP2, ZeRO-3 or accelerate, as they were when the decoder was captured.

    Raises:
        InputError: the schedule reads parameters that no call gathers or loads.
        HidropError: the processes run different schedules, or the call went past the module that gathers.
    """
    placement = capture.decoder.placement
    if capture.decoder.sharded:
        _follow_sharding(runtime, capture.source)
    elif placement is not None:
        _follow_placement(runtime, placement)


def _follow_sharding(runtime: "Runtime", decoder: Any) -> None:
    check_gathered(decoder)
    _leave_graphs(runtime, SHARDED)
    if runtime.programs.store.agreed is runtime.plan:
        return
    check_schedule(runtime.schedule, partitioned=is_partitioned(decoder))
    _call_layers(runtime, SHARDED)
    ratios = runtime.ratios
    if ratios is not None and not ratios.shared:
        runtime.log_once(
            f"model.{runtime.ratios_at} is left out by what shards the model (ignored_params?): nothing averages its gradient "
            "over the processes, and each would learn other ratios",
            logging.WARNING,
        )
    _agree(runtime, decoder)


def _follow_placement(runtime: "Runtime", placement: Placement) -> None:
    _leave_graphs(runtime, f"the text decoder {placement}")
    _call_layers(runtime, f"the text decoder {placement}")
    if not placement.offloaded:
        return
    check_schedule(runtime.schedule, "accelerate offloads")
    if torch.is_grad_enabled() and any(
        p.is_meta and p.requires_grad for p in text_decoder(runtime.model).parameters()
    ):
        runtime.log_once(
            "weights that accelerate loads for each call and drops behind it get no gradient, as in the model that is not "
            "compiled; the others get theirs",
            logging.WARNING,
        )


def _leave_graphs(runtime: "Runtime", why: str) -> None:
    if runtime.graphs is not None:
        for peer in runtime.peers:
            peer.graphs = None
        runtime.log_once(f"{why}: it runs without CUDA graphs")


def _call_layers(runtime: "Runtime", why: str) -> None:
    if runtime.options.lowering == "whole":
        runtime.log_once(
            f"{why}: its layers are called one by one, as lowering='bodies' does, not 'whole'"
        )


def _agree(runtime: "Runtime", decoder: Any) -> None:
    """Compare a schedule that processes have not run together yet, or not last, with theirs."""
    store = runtime.programs.store
    changes = store.agreed is not None
    store.agreed = None  # an error leaves nothing agreed
    store.mesh = mesh_of(decoder) or store.mesh  # none is found where all is kept gathered
    text = f"{runtime.schedule} on {runtime.plan.num_layers} layers"
    check_agreement(store.mesh, text, changes=changes)
    store.agreed = runtime.plan
