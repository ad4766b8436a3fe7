"""Text decoders by model type, and the attention masks that they take."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A text decoder, by `config.model_type`."""

    mask_by_layer_type: bool = False
    """Its forward takes a dict of masks, one for each name in `config.layer_types`."""

    def layer_types(self, config: Any) -> tuple[str, ...]:
        """Return the names of the masks that the decoder takes; empty where one mask serves all layers."""
        return tuple(dict.fromkeys(config.layer_types)) if self.mask_by_layer_type else ()


BACKBONES: dict[str, Backbone] = {
    "llama": Backbone(),
    "mistral": Backbone(),
    "qwen2": Backbone(mask_by_layer_type=True),
    "qwen3": Backbone(mask_by_layer_type=True),
    "qwen2_vl_text": Backbone(mask_by_layer_type=True),
    "qwen2_5_vl_text": Backbone(mask_by_layer_type=True),
    "glm4v_text": Backbone(),
    "paddleocr_vl_text": Backbone(),
}
