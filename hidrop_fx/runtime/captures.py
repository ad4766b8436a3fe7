"""A captured decoder: what its graph depends on, and the executables made from it."""

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hidrop_fx.capture import CapturedDecoder, capture
from hidrop_fx.lowering import Executable
from hidrop_fx.models import backbone_of
from hidrop_fx.pipeline import Output
from hidrop_fx.program import Kind
from hidrop_fx.regions import find_regions

logger = logging.getLogger("hidrop_fx")

_PLAIN = (bool, int, float, str)
# Where PEFT keeps which adapters act, and how strongly.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")

# Read at every call instead.
_NOT_IN_GRAPH = ("gradient_checkpointing",)

_ProgramKey = tuple[Kind, Output, tuple[str, ...], bool, bool]


@dataclass(kw_only=True, eq=False)
class Capture:
    """A captured decoder and the executables made from it."""

    decoder: CapturedDecoder
    windows: dict[str, int]
    """Sliding window of each captured mask that has one."""
    kv_shapes: list[tuple[int, int]]
    """KV heads and head width of each layer."""
    executables: dict[_ProgramKey, Executable] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """A copied cache, e.g. of a shared prefix, goes on with the programs that filled it."""
        return self


def capture_model(model: Any) -> Capture:
    """Trace the text decoder of a model."""
    traced = model.get_decoder()
    embedding = traced.get_input_embeddings()  # called as a module, hooks and all
    hooked = [
        name
        for name, module in traced.named_modules()
        if module is not embedding and _user_hooks(module)
    ]
    if hooked:
        logger.warning(
            "hooks on %s of the decoder do not run in a compiled model; what they changed while "
            "it was captured stays",
            ", ".join(hooked[:3]),
        )
    types = backbone_of(model).layer_types(model.config.get_text_config())
    decoder = capture(traced, layer_types=types)
    windows: dict[str, int] = {}
    shapes = []
    for region in find_regions(decoder.module.graph, decoder.layers, decoder.num_layers):
        _, _, value, mask, _, _, window = region.attention.args
        shape = value.meta["val"].shape  # type: ignore[union-attr]
        shapes.append((int(shape[1]), int(shape[3])))
        if window is not None:
            windows[str(mask)] = window  # type: ignore[assignment]
    return Capture(decoder=decoder, windows=windows, kv_shapes=shapes)


def fingerprint(decoder: Any) -> Any:
    """What a captured graph depends on: modules, parameters and buffers as objects, and the plain
    values that their code reads (mode, dropout, scale, which adapter is active).
    """
    key: list[Any] = []
    embedding = decoder.get_input_embeddings()
    for module in decoder.modules():
        values = module.__dict__
        key.append(id(module))
        key += [v for k, v in values.items() if type(v) in _PLAIN and k not in _NOT_IN_GRAPH]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                key += (id(tensor), tensor.dtype, tensor.device)
        if (module._forward_hooks or module._forward_pre_hooks) and module is not embedding:
            key += _user_hooks(module)
        if any(name in values for name in _ADAPTER_STATE):
            key += [repr(values.get(name)) for name in _ADAPTER_STATE]
    return tuple(key)


def _user_hooks(module: nn.Module) -> tuple[int, ...]:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = "transformers.utils.output_capturing"
    return tuple(id(hook) for hook in hooks if getattr(hook, "__module__", "") != ours)
