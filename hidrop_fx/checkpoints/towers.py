"""The directory of a vision tower: its config, its weights, and how it wants its images.

CLIP as a whole, as openai/clip-vit-large-patch14-336 on the Hub, or its vision model alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from hidrop_fx.checkpoints.original_config import CONFIG, GENERIC, OriginalConfig, read_json
from hidrop_fx.checkpoints.routes import routed_tower
from hidrop_fx.checkpoints.weight_files import KINDS, Entry, find_weights
from hidrop_fx.errors import HidropError

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A CLIP vision tower on disk."""

    directory: Path
    config: CLIPVisionConfig
    patches: int
    """Of an image."""
    images: Mapping[str, Any]
    """Its preprocessor_config.json."""

    def entries(self) -> dict[str, Entry]:
        """Return its weights by their places in the model; none if the directory has no weight files."""
        names = [f"{stem}*{suffix}*" for stem, suffix in KINDS]
        if not any(True for name in names for _ in self.directory.glob(name)):
            return {}
        return routed_tower(find_weights(self.directory))


def find_tower(config: OriginalConfig, directory: str | Path | None) -> Tower:
    """Find the vision tower of a checkpoint: in `directory`, or where its config says, if that is a directory here.

    Raises:
        HidropError: there is none, or it is not CLIP's, or another than the checkpoint was trained with.
    """
    path = Path(config.tower if directory is None else directory)
    if not path.is_dir():
        given = (
            "vision_tower is not given, and"
            if directory is None
            else f"vision_tower={str(path)!r}:"
        )
        raise HidropError(
            f"{given} {str(path)!r} is no directory here; {config.path} names mm_vision_tower={config.tower!r}: download that and "
            "pass its directory"
        )
    values = read_json(path / CONFIG, "a vision tower has one")
    kind = values.get("model_type")
    inner = values.get("vision_config") if kind == "clip" else values
    if kind not in ("clip", "clip_vision_model") or not isinstance(inner, dict):
        raise HidropError(
            f"{path / CONFIG}: model_type={kind!r} is no CLIP vision tower, which the original LLaVA has; "
            f"{config.path} names mm_vision_tower={config.tower!r}"
        )
    known = set(CLIPVisionConfig().to_dict()) - GENERIC
    tower = CLIPVisionConfig(**{key: value for key, value in inner.items() if key in known})
    config.check_tower(tower, path)
    side, patch = tower.image_size, tower.patch_size
    if not isinstance(side, int) or not isinstance(patch, int):
        raise HidropError(
            f"{path / CONFIG}: image_size={side}, patch_size={patch}: squares are expected"
        )
    images = read_json(path / PREPROCESSOR, "it says how images are resized and normalised")
    crop = images.get("crop_size", images.get("size"))
    sides = [*crop.values()] if isinstance(crop, dict) else [crop]
    if any(each != side for each in sides):
        raise HidropError(
            f"{path / PREPROCESSOR}: crop_size={crop}, and {path / CONFIG} says image_size={side}: they are not of "
            "one model"
        )
    return Tower(directory=path, config=tower, patches=(side // patch) ** 2, images=images)


def image_settings(tower: Tower, *, pads: bool) -> dict[str, Any]:
    """Return the preprocessor_config.json of the model: the tower's, padding an image to a square first where LLaVA does."""
    dropped = (
        "feature_extractor_type",
        "image_processor_type",
        "processor_class",
        "_processor_class",
    )
    values = {key: value for key, value in tower.images.items() if key not in dropped}
    if pads:
        return {**values, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {**values, "image_processor_type": "CLIPImageProcessor"}
