"""LLaVA 1.5 with Pixtral's tower: an image has as many tokens as it has patches, by `image_sizes`.

Without sizes the tower takes all pixels of each image, and gives the features of all images in one piece.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hidrop_fx.models.family import Family
from hidrop_fx.planning.geometry import varying_patches


def llava(family: Family) -> Family:
    image = family.modality("image")
    assert image is not None
    encode = image.encode

    def encode_sized(base: Any, given: dict[str, Any]) -> Any:
        return encode(base, _with_image_sizes(base.config, given))

    image = replace(image, encode=encode_sized, completed=_with_image_sizes, lengths=_lengths)
    return replace(family, modalities=(image,))


def _with_image_sizes(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    pixels = given.get("pixel_values")
    if pixels is None or given.get("image_sizes") is not None or varying_patches(config) is None:
        return given
    sizes = pixels.new_tensor(pixels.shape[-2:]).long().expand(len(pixels), -1)
    return {**given, "image_sizes": sizes}


def _lengths(config: Any, given: Mapping[str, Any]) -> list[int] | None:
    patch, sizes = (
        varying_patches(config),
        _with_image_sizes(config, dict(given)).get("image_sizes"),
    )
    if patch is None or sizes is None:
        return None
    return [(int(height) // patch) * (int(width) // patch) for height, width in sizes]
