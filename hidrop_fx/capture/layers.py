"""Find the list of decoder layers of a text model."""

from typing import Any

from torch import nn

from hidrop_fx.errors import CaptureError


def layer_list(decoder: Any) -> tuple[str, nn.ModuleList]:
    """Return the list of `decoder`'s layers with its module path, e.g. ("layers", decoder.layers).

    Raises:
        CaptureError: the decoder has no `ModuleList` of `config.num_hidden_layers` modules.
    """
    count = getattr(decoder.config, "num_hidden_layers", None)
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise CaptureError(
        f"{type(decoder).__name__} has no ModuleList of its {count} decoder layers; "
        "hidrop_fx rewrites decoders whose layers are listed in one"
    )
