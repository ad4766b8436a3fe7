"""Tiny LLaVA models with other vision towers than CLIP's, and batches of images of their own sizes.

model = tiny_tower("pixtral")
inputs = sized_batch(model, [[5, (2, 3), 7], [8, (4, 2), (1, 1), 9]])      # images as rows and columns of patches
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from tests.support.models import IMAGE_TOKEN, PAD, PATCH, tiny_llava

SIDE: Final = 3
"""Patches along a side of an image, where all are alike."""
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
# Config, and tokens of an image of 3 x 3 patches under each strategy.
_TOWERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], str, int]] = {
    "clip": (CLIPVisionConfig, {"projection_dim": 32}, "default", 9),
    "siglip": (SiglipVisionConfig, {"vision_use_head": False}, "full", 9),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2}, "default", 9),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 4},
        "default",
        13,
    ),
    "vit": (ViTConfig, {}, "full", 10),
}
TOWERS: Final = tuple(_TOWERS)

Row = Sequence[int | tuple[int, int]]
"""Token ids, and images as rows and columns of patches."""


def tiny_tower(tower: str, backbone: str = "llama", **options: Any) -> Any:
    """Make a LLaVA with a tower of 3 x 3 patches an image, or "pixtral" for images of any size up to 8 x 8."""
    if tower == "pixtral":
        vision: PreTrainedConfig = PixtralVisionConfig(**{**_SIZES, "image_size": 8 * PATCH})
        strategy = "full"
    else:
        config, own, strategy, _ = _TOWERS[tower]
        vision = config(**{**_SIZES, **own})
    return tiny_llava(
        backbone,
        vision=vision,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
        image_seq_length=577,  # as configs have it, whatever the tower
        **options,
    )


def image_tokens(tower: str) -> int:
    """Return the tokens of an image of 3 x 3 patches."""
    return _TOWERS[tower][3]


def sized_batch(
    model: Any, rows: Sequence[Row], *, padding: str = "left", tokens: int | None = None
) -> dict[str, Tensor]:
    """Make a padded batch of images of these sizes, `pixel_values` as large as the largest.

    Args:
        tokens: tokens of every image, where they are not those of its patches: no `image_sizes` then.
    """
    expanded = [
        [
            token
            for item in row
            for token in (
                [IMAGE_TOKEN] * (tokens or item[0] * item[1]) if isinstance(item, tuple) else [item]
            )
        ]
        for row in rows
    ]
    width = max(map(len, expanded))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(expanded):
        start = width - len(row) if padding == "left" else 0
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    sizes = [
        (PATCH * a, PATCH * b) for row in rows for a, b in (i for i in row if isinstance(i, tuple))
    ]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not sizes:
        return inputs
    largest = [max(sides) for sides in zip(*sizes, strict=True)]
    pixels = torch.zeros(len(sizes), 3, *largest)
    generator = torch.Generator().manual_seed(0)
    for image, (height, across) in zip(pixels, sizes, strict=True):
        image[:, :height, :across] = torch.randn(3, height, across, generator=generator)
    inputs["pixel_values"] = pixels.to(model.dtype)
    return inputs if tokens else inputs | {"image_sizes": torch.tensor(sizes)}
