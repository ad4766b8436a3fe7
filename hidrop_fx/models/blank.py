"""A blank image of a model, for a process whose batch has none while others run the vision tower."""

from typing import Any

import torch

from hidrop_fx.capture.layers import base_of
from hidrop_fx.errors import InputError
from hidrop_fx.models.encoding import Encoded, encode
from hidrop_fx.models.family import Family
from hidrop_fx.models.kept_cells import GRID, blank_images


def encode_blank(family: Family, model: Any, dtype: torch.dtype, device: torch.device) -> Encoded:
    """Encode one image of zeros.

    Args:
        dtype, device: of what the tower is given.

    Raises:
        InputError: how an image of this model is made is not known.
    """
    kind, base, config = family.modalities[0], base_of(model), model.config.vision_config
    size = getattr(config, "image_size", None)
    if GRID in kind.inputs and hasattr(base, "visual"):
        inputs = blank_images(base, 1, 1)
        inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    elif isinstance(size, int) and kind.pixels == "pixel_values":
        shape = (1, getattr(config, "num_channels", 3), size, size)
        inputs = {"pixel_values": torch.zeros(shape, dtype=dtype, device=device)}
    else:
        raise InputError(
            f"the batch has no image, and fully_shard or ZeRO-3 shards the vision tower of this {type(model).__name__}, which every "
            f"process must run; put an image into each process's batch (hidrop_fx makes no blank {kind.name} of {kind.pixels})"
        )
    return encode(family, base, inputs)
