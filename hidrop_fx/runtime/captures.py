"""A captured decoder: what its graph depends on, and the executables made from it."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.export import capture
from hidrop_fx.capture.quantised import check_weights
from hidrop_fx.capture.regions import KVShape, Region, find_regions
from hidrop_fx.errors import CaptureError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.runtime.fingerprint import user_hooks

logger = logging.getLogger("hidrop_fx")

_ProgramKey = tuple[Kind, Variant]


@dataclass(kw_only=True, eq=False)
class Capture:
    """A captured decoder and the executables made from it."""

    decoder: CapturedDecoder
    windows: dict[str, int]
    """Sliding window of each captured mask that has one."""
    kv_shapes: list[KVShape]
    """KV heads and head widths of each layer."""
    executables: dict[_ProgramKey, Executable] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the graph reads."""
        return list(self.decoder.module.parameters())

    @property
    def trains(self) -> bool:
        """True if a parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters)

    def outlived_by(self, decoder: nn.Module) -> bool:
        """Return True if it holds parameters that the decoder has replaced, as by quantised ones."""
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


def capture_model(model: Any) -> Capture:
    """Trace the text decoder of a model."""
    traced = model.get_decoder()
    for name, value in traced.named_parameters():
        if not isinstance(value, nn.Parameter):
            raise CaptureError(
                f"{name} is a {type(value).__name__} in the place of a parameter, as torch.func.functional_call "
                "puts it there for one call; a compiled decoder runs its own parameters. Copy the values "
                "into them, or call hidrop_fx.restore(model) first"
            )
    check_weights(traced, traced)
    embedding = set(traced.get_input_embeddings().modules())  # called, hooks and all
    hooked = [
        name
        for name, module in traced.named_modules()
        if module not in embedding and user_hooks(module)
    ]
    if hooked:
        logger.warning(
            "hooks on %s of the decoder do not run in a compiled model; what they changed while "
            "it was captured stays",
            ", ".join(hooked[:3]),
        )
    types = backbone_of(model).layer_types(model.config.get_text_config())
    decoder = capture(traced, layer_types=types, axes=family_of(model).axes)
    regions = find_regions(decoder.module.graph, decoder.layers, decoder.num_layers)
    windows = _windows(regions, decoder.masks)
    return Capture(decoder=decoder, windows=windows, kv_shapes=[r.kv_shape for r in regions])


def _windows(regions: list[Region], masks: tuple[str, ...]) -> dict[str, int]:
    """Return the sliding window of each captured mask that has one.

    Raises:
        CaptureError: a layer reads none of the masks, two layers read one mask by different windows, or
            a window is not what the mask's name says.
    """
    named = {"mask_full_attention": False, "mask_sliding_attention": True}
    found: dict[str, int | None] = {}
    for region in regions:
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
