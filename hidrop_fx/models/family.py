"""The interface of a model family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of VLMs: how images are encoded, and the types of its outputs."""

    placeholder: Callable[[Any], int]
    """Token id of a vision place, from the model's config."""
    encode_images: Callable[[Any, dict[str, Any]], list[Tensor]]
    """Projected features [tokens, D] of every image in order, from the base model and its inputs."""
    pixels: str
    """The input of forward that holds the images."""
    base_output: type
    """What `model.model(...)` returns."""
    output: type
    """What `model(...)` returns."""
