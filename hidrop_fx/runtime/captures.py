"""A captured decoder: what its graph depends on, and the executables made from it."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hidrop_fx.capture.admission import check_capturable
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.export import capture
from hidrop_fx.capture.hooks import announce_hooks, described
from hidrop_fx.capture.layer_wrappers import announce_offloading, without_wrappers
from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.capture.libraries import is_foreign
from hidrop_fx.capture.parallel_styles import is_divided
from hidrop_fx.capture.placement import placement_of, stand_where_they_run
from hidrop_fx.capture.regions import KVShape, Region, StateShape, find_regions
from hidrop_fx.capture.sharded import check_sharding, is_sharded, shown_whole
from hidrop_fx.capture.tensor_parallel import (
    joined_in,
    processes_of,
    put_back,
    replace_marks,
    shown_own_parts,
)
from hidrop_fx.errors import CaptureError, ScheduleError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.ops.masks import CHUNKED, MaskRule
from hidrop_fx.program.variant import Kind, Variant

logger = logging.getLogger("hidrop_fx")

_ProgramKey = tuple[Kind, Variant]


@dataclass(kw_only=True, eq=False)
class Capture:
    """A captured decoder and the executables made from it."""

    decoder: CapturedDecoder
    windows: dict[str, int]
    """Sliding window, or size of the chunks, of each captured mask that has one."""
    rules: dict[str, MaskRule]
    """The rule of each captured mask, for any prompt."""
    kv_shapes: list[KVShape | StateShape]
    """Of each entry of a cache: KV heads and head widths, or the sizes of a state."""
    owners: list[int]
    """The layer of each entry: all layers in order, then those that keep a state beside their keys and values."""
    executables: dict[_ProgramKey, Executable] = field(default_factory=dict)
    source: nn.Module | None = None
    """The decoder, where the graph has stand-ins for its parameters."""
    branch: CapturedDecoder | None = None
    """Layers of a side branch, as a decoder of their own, where a schedule reads one."""

    @property
    def devices(self) -> tuple[torch.device, ...] | None:
        """Device of each layer, where there are several; None where all layers lie with the embedding."""
        placement = self.decoder.placement
        return None if placement is None or not placement.spread else placement.layers

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the graph reads."""
        return list(self.decoder.module.parameters())

    @property
    def trains(self) -> bool:
        """True if a parameter requires a gradient."""
        parameters = self.parameters if self.source is None else self.source.parameters()
        if any(parameter.requires_grad for parameter in parameters):
            return True
        return self.branch is not None and any(
            p.requires_grad for p in self.branch.module.parameters()
        )

    def outlived_by(self, decoder: nn.Module) -> bool:
        """Return True if it holds parameters that the decoder has replaced, as by quantised ones."""
        if self.source is not None:
            return False
        present = {id(parameter) for parameter in decoder.parameters()}
        return any(id(parameter) not in present for parameter in self.parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """Return the capture itself: a copied cache goes on with the programs that filled it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it out of a pickled cache, which goes on with the capture of a model that it is handed to."""
        return _none, ()


def _none() -> None:
    """Return None, for what a pickle leaves out."""


def capture_model(model: Any, num_layers: int | None = None, decoder: Any = None) -> Capture:
    """Trace the text decoder of a model.

    Args:
        decoder: another of its class, in place of the model's own.
        num_layers: layers that it must have, those of the plan; None if any number will do.

    Raises:
        UnsupportedModelError, CaptureError: it holds what no graph can.
        ScheduleError: it has another number of layers.
    """
    traced = text_decoder(model) if decoder is None else decoder
    for name, value in traced.named_parameters():
        if not isinstance(value, nn.Parameter):
            raise CaptureError(
                f"{name} is a {type(value).__name__} in the place of a parameter, as torch.func.functional_call "
                "puts it there for one call; a compiled decoder runs its own parameters. Copy the values "
                "into them, or call hidrop_fx.restore(model) first"
            )
    check_sharding(model, traced)
    check_capturable(traced, traced)
    found = len(layer_list(traced)[1])
    if num_layers not in (None, found):
        raise ScheduleError(
            f"the model was compiled with {num_layers} layers and has {found} now; call "
            "hidrop.compile(model, schedule) again"
        )
    announce_hooks(traced)
    announce_offloading(traced)
    _announce_code(traced)
    types = backbone_of(model).layer_types(model.config.get_text_config())
    family = family_of(model)
    sharded, divided = is_sharded(traced), is_divided(traced)
    placement = None if sharded or divided else placement_of(traced)
    entry = None if placement is None else placement.entry
    shown = shown_whole(traced) if sharded else nullcontext()
    if divided and not sharded:
        shown = shown_own_parts(traced)
    with shown, without_wrappers(traced):
        captured = capture(traced, layer_types=types, axes=family.axes, device=entry)
    captured = replace(captured, sharded=sharded, placement=placement)
    if placement is not None and placement.offloaded:
        stand_where_they_run(captured.module, traced, placement)
    if divided:
        replace_marks(captured.module.graph)
        put_back(captured.module, traced)
        captured.module.recompile()
        captured = replace(captured, processes=processes_of(traced))
    if family.deepstack is not None:
        captured = replace(captured, deepstack=family.deepstack.places(model.config))
    regions = find_regions(
        captured.module.graph, captured.layers, captured.num_layers, captured.tokenwise
    )
    if captured.processes is not None:
        names = {name for name, _ in traced.named_parameters(remove_duplicate=False)}
        joined = joined_in(captured.module.graph, regions, captured.processes.divided, names)
        captured = replace(captured, processes=replace(captured.processes, joined=joined))
    windows = _windows(regions, captured.masks)
    both = [region for region in regions if region.attends and region.keeps_state]
    return Capture(
        decoder=captured,
        windows=windows,
        rules={name: family.rule(name, windows.get(name)) for name in captured.masks},
        kv_shapes=[(r.is_recurrent and r.state_shape) or r.kv_shape for r in regions]
        + [shape for r in both if (shape := r.state_shape) is not None],
        owners=[*range(len(regions)), *(region.layer for region in both)],
        source=traced if captured.stands_in else None,
    )


def _windows(regions: list[Region], masks: tuple[str, ...]) -> dict[str, int]:
    """Return the sliding window of each captured mask that has one.

    Raises:
        CaptureError: a layer reads none of the masks, two layers read one mask by different windows, or
            a window is not what the mask's name says.
    """
    named = {"mask_full_attention": False, "mask_sliding_attention": True, f"mask_{CHUNKED}": True}
    found: dict[str, int | None] = {}
    for region in regions:
        if not region.attends:
            continue
        call = CapturedArguments.of(region.attention)
        name, window = str(call.mask), call.sliding_window
        if name not in masks:
            raise CaptureError(
                f"the attention of {region.path} reads the mask {name}, which is not as it was given "
                f"({', '.join(masks)}); a mask of the decoder's own making cannot follow its tokens"
            )
        if found.setdefault(name, window) != window:
            raise CaptureError(
                f"{region.path} reads {name} with sliding_window={window}, a layer before it with "
                f"{found[name]}; a decoder whose layers attend by different rules must take a dict of masks, "
                "by config.layer_types"
            )
        if named.get(name, window is not None) != (window is not None):
            raise CaptureError(
                f"{region.path} reads {name} with sliding_window={window}; a window is known by what a layer "
                "hands to its attention function, and this one contradicts config.layer_types"
            )
    return {name: window for name, window in found.items() if window is not None}


def _announce_code(decoder: nn.Module) -> None:
    """Log which layers run code that is no library's: it is followed as far as Python shows."""
    names = [
        f"{path or 'the decoder'} ({described(found)})"
        for path, module in decoder.named_modules()
        for found in (module.__dict__.get("forward"), type(module).forward)
        if found is not None and is_foreign(found)
    ]
    if names:
        logger.info(
            "the decoder runs code that is not transformers', torch's or PEFT's: %s. A change of it, or of the "
            "Python values that it reads, is noticed; what it does beside computing tensors is done once",
            ", ".join(names[:3]),
        )


def check_gradients(capture: Capture, decoder: nn.Module) -> None:
    """Raise where gradients are enabled, and those of a captured graph would not be the decoder's own.

    Raises:
        CaptureError: names the module and the function.
    """
    captured = capture.decoder
    joined = "" if captured.processes is None else captured.processes.joined
    if not (captured.custom_backwards or captured.ends_gradients or joined):
        return
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in decoder.parameters()):
        return
    if joined:
        raise CaptureError(
            f"{joined}, which all processes of tensor parallelism hold: the gradient of the second would be a term of the "
            "true one. Call the model under torch.no_grad() for answers, and train it with a tp_plan that divides both or sums the "
            "gradient ('replicated_with_grad_allreduce', for norms of heads)"
        )
    if captured.custom_backwards:
        name, module = next(iter(captured.custom_backwards.items()))
        what = f"{module} calls {name}, a torch.autograd.Function with a backward of its own"
    else:
        what = f"{captured.ends_gradients[0]} computes under torch.no_grad()"
    raise CaptureError(
        f"{what}, and a captured graph has the forward alone: its gradients would be others. Call the model under "
        "torch.no_grad() for answers, and train it uncompiled (hidrop.restore(model)), or without that module"
    )
