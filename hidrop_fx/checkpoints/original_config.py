"""The config.json of a checkpoint in LLaVA's original format: which text model, tower and projector, and what each key means.

    LlavaLlamaForCausalLM(config)                     # a LlamaForCausalLM with two modules more
        .model.vision_tower.vision_tower              # mm_vision_tower, read at mm_vision_select_layer / _feature
        .model.mm_projector                           # mm_projector_type

All keys lie in one flat object: those of the text model, and the others.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, CLIPVisionConfig

from hidrop_fx.errors import HidropError

CONFIG = "config.json"
TEXT_TYPES: dict[str, str] = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen": "qwen2",
    "qwen2": "qwen2",
}
"""What follows "llava_" in a model type -> the type of the text model in transformers."""
REDUCED: tuple[str, ...] = ("exit_topk_cdp", "exit_sep_topk", "exit_topk", "exit", "topk", "pdrop")
"""What follows the text model in a model type whose vision tokens were reduced in training (HiDrop's repository)."""
PROJECTORS: tuple[str, ...] = ("linear", "mlp2x_gelu")
SELECTED: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"

# What a CLIP's name on the Hub tells: patch size, and image size where it is not the usual one.
_SIZES = re.compile(r"clip-vit-\w+-patch(\d+)(?:-(\d+))?/?$")
_PIXELS = 224

# Of the text model, and of every config: they are carried over, or say nothing about the numbers.
GENERIC = {
    "_name_or_path",
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
}
GENERIC |= {"rope_theta", "rope_scaling", "rope_parameters", "auto_map", "quantization_config"}
_KNOWN = {
    *("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer"),
    *(
        "mm_vision_select_feature",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
        "mm_projector_lr",
    ),
    *("mm_patch_merge_type", "mm_resampler_type", "mm_tunable_parts", "mm_vision_tower_lr"),
    *("use_mm_proj", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "pretrain_mm_mlp_adapter"),
    *(
        "unfreeze_mm_vision_tower",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "sep_image_conv_front",
    ),
    *("image_crop_resolution", "image_split_resolution", "vision_tower_pretrained", "s2"),
    *("tokenizer_model_max_length", "tokenizer_padding_side", "max_sequence_length"),
    *("late_entry_layer", "early_exit_layer", "layer_list", "image_token_keep_list"),
    *(
        "image_token_ratio_list",
        "twig_K",
        "twig_T",
        "avg_retain_rank",
        "wipe_layer",
        "finalwipe_layer",
    ),
    # Of the first versions of LLaVA, beside mm_vision_tower and mm_projector_type.
    *("mm_use_vision_tower", "retrieve_image_feature", "use_image_start_end"),
}


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """A checkpoint's config.json, checked."""

    path: Path
    values: Mapping[str, Any]
    """As it was read."""
    text_type: str
    """Model type of the text model in transformers."""
    reduced: str
    """How vision tokens were reduced in training, of `REDUCED`; empty if the model type does not say."""
    projector: str
    """One of `PROJECTORS`."""
    select_layer: int
    """Index into the tower's hidden states."""
    strategy: Literal["default", "full"]
    """`vision_feature_select_strategy`: "default" drops the tower's first token, "full" keeps it."""
    pads_to_square: bool
    """An image is padded to a square with the mean colour, where it is cropped otherwise."""
    tower_inside: bool
    """The tower was trained too, and its weights are those of the checkpoint."""
    wrapped: bool
    """An image stands between `START_TOKEN` and `END_TOKEN`."""
    new_tokens: tuple[str, ...]
    """Tokens that LLaVA's loader adds to the tokenizer where it does not have them."""

    @property
    def tower(self) -> str:
        """Name of the vision tower: an id on the Hub, or a path on the authors' machine."""
        return str(self.values["mm_vision_tower"])

    @property
    def num_layers(self) -> int:
        """Decoder layers of the text model."""
        return int(self.text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.text_config().vocab_size)

    def unknown_keys(self) -> list[str]:
        """Return the keys that belong neither to the text model nor to what LLaVA is known to write."""
        return sorted(set(self.values) - _KNOWN - GENERIC - self._text_keys())

    def text_config(self, **replaced: Any) -> Any:
        """Return the config of the text model, with some values replaced."""
        carried = self._text_keys() | {"rope_theta", "rope_scaling", "rope_parameters"}
        values = {key: value for key, value in self.values.items() if key in carried}
        return AutoConfig.for_model(self.text_type, **{**values, **replaced})

    def check_tower(self, tower: CLIPVisionConfig, directory: Path) -> None:
        """Raise `HidropError` unless a tower is as wide, and as deep, as the checkpoint says, and takes images as large."""
        width = self.values.get("mm_hidden_size")
        if width is not None and width != tower.hidden_size:
            raise HidropError(
                f"{self.path}: mm_hidden_size={width}, and the vision tower in {directory} is {tower.hidden_size} wide; "
                f"pass the directory of {self.tower!r}"
            )
        named = _SIZES.search(self.tower)
        if named is not None:  # a smaller one of the same width would run, and see less
            sizes = int(named[2] or _PIXELS), int(named[1])
            if sizes != (tower.image_size, tower.patch_size):
                raise HidropError(
                    f"{self.path}: mm_vision_tower={self.tower!r}, and the vision tower in {directory} takes images of "
                    f"{tower.image_size} pixels in patches of {tower.patch_size}; pass the directory of the tower that it was "
                    "trained with, or correct mm_vision_tower"
                )
        states = tower.num_hidden_layers + 1
        if not -states <= self.select_layer < states:
            raise HidropError(
                f"{self.path}: mm_vision_select_layer={self.select_layer}, and the vision tower in {directory} has "
                f"{tower.num_hidden_layers} layers; pass the directory of {self.tower!r}"
            )

    def _text_keys(self) -> set[str]:
        return set(AutoConfig.for_model(self.text_type).to_dict()) - GENERIC


def read_config(directory: Path) -> OriginalConfig:
    """Read the config.json of a checkpoint in the original format.

    Raises:
        HidropError: there is none, or it is of another format, or a key has a value that is not supported.
    """
    path = directory / CONFIG
    values = read_json(path, "a checkpoint has one")
    text_type, reduced = _kinds(path, values)
    if not values.get("mm_vision_tower"):
        raise HidropError(
            f"{path} has no mm_vision_tower: it is not that of a LLaVA checkpoint in the original format"
        )
    projector = _one_of(path, values, "mm_projector_type", PROJECTORS, "linear")
    selected = _one_of(path, values, "mm_vision_select_feature", tuple(SELECTED), "patch")
    layer = values.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise HidropError(f"{path}: mm_vision_select_layer={layer!r} is no int")
    _refuse(path, values)
    wrapped = bool(values.get("mm_use_im_start_end", False))
    patch = (PATCH_TOKEN,) if values.get("mm_use_im_patch_token", True) else ()
    return OriginalConfig(
        path=path,
        values=values,
        text_type=text_type,
        reduced=reduced,
        projector=projector,
        select_layer=layer,
        strategy=SELECTED[selected],
        pads_to_square=values.get("image_aspect_ratio") == "pad",
        tower_inside=bool(values.get("unfreeze_mm_vision_tower", False)),
        wrapped=wrapped,
        new_tokens=(*patch, *((START_TOKEN, END_TOKEN) if wrapped else ())),
    )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HidropError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise HidropError(f"{path} does not exist: {remedy}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HidropError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise HidropError(f"{path} holds a {type(found).__name__}, not a JSON object")
    return found


def _kinds(path: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type of the text model, and how vision tokens were reduced in training."""
    kind = str(values.get("model_type"))
    if kind == "llava" and "text_config" in values:
        raise HidropError(
            f"{path}: model_type='llava' with a text_config is Hugging Face's format already; load it with from_pretrained"
        )
    text, _, reduced = ("llama" if kind == "llava" else kind.removeprefix("llava_")).partition("_")
    names = [str(name) for name in values.get("architectures") or ()]
    if not reduced and any(name.lower().endswith("pdrop") for name in names):
        reduced = "pdrop"
    if not kind.startswith("llava") or text not in TEXT_TYPES or reduced not in ("", *REDUCED):
        known = ", ".join(f"llava_{name}" for name in TEXT_TYPES)
        raise HidropError(
            f"{path}: model_type={kind!r} is not one that can be imported; these can: {known}, and llava_llama_ with "
            f"{', '.join(REDUCED)}"
        )
    return TEXT_TYPES[text], reduced


def _one_of(
    path: Path, values: Mapping[str, Any], key: str, known: tuple[str, ...], default: str
) -> str:
    value = values.get(key) or default
    if value not in known:
        raise HidropError(
            f"{path}: {key}={value!r} has no counterpart in LlavaForConditionalGeneration; these have: {', '.join(known)}"
        )
    return str(value)


def _refuse(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `HidropError` for what changes the model's numbers and has no counterpart."""
    ratio = values.get("image_aspect_ratio")
    if ratio not in (None, "square", "pad"):
        raise HidropError(
            f"{path}: image_aspect_ratio={ratio!r} cuts an image into tiles, as LLaVA-NeXT (1.6) and OneVision do, which "
            "LlavaForConditionalGeneration does not; use their checkpoints in Hugging Face's format (llava-hf on the Hub), which "
            "hidrop_fx.compile takes"
        )
    for key in ("s2", "mm_resampler_type", "quantization_config", "sep_image_conv_front"):
        if values.get(key):
            raise HidropError(
                f"{path}: {key}={values[key]!r} has no counterpart in LlavaForConditionalGeneration"
            )
