"""The place of each of a checkpoint's tensors in `LlavaForConditionalGeneration`, and a check that all are there.

    model.layers.0.self_attn.q_proj.weight                -> language_model.model.layers.0.self_attn.q_proj.weight
    lm_head.weight                                        -> language_model.lm_head.weight
    model.mm_projector.0.weight                           -> multi_modal_projector.linear_1.weight
    model.vision_tower.vision_tower.vision_model.<name>   -> vision_tower.vision_model.<name>

The names on the right are those of llava-1.5-7b-hf on the Hub, which every version of transformers reads.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from hidrop_fx.checkpoints.original_config import OriginalConfig
from hidrop_fx.checkpoints.weight_files import Entry
from hidrop_fx.errors import HidropError

TEXT, TOWER, PROJECTOR, TWIG = (
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "twig.",
)
EMBEDDING, HEAD = f"{TEXT}model.embed_tokens.weight", f"{TEXT}lm_head.weight"
_TOWER_INSIDE = "model.vision_tower.vision_tower."
_PROJECTOR_INSIDE = "model.mm_projector."
_TWIG_INSIDE = "model.twig_layers."
_LINEAR = {"": "linear_1.", "0.": "linear_1.", "2.": "linear_2."}
# Buffers that are computed, of older versions of transformers.
_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
# Of CLIP as a whole, beside its vision tower.
_CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_TWIG_HEAD = ("model.twig_norm.weight", "model.twig_head.weight")
NEWLINE = "model.image_newline"

Shape = tuple[int, ...]


def route(key: str) -> str | None:
    """Return the place of a tensor of the original format, which may be none that the model has; None for computed buffers."""
    if key.endswith(_COMPUTED):
        return None
    if key.startswith(_TOWER_INSIDE):
        return TOWER + key.removeprefix(_TOWER_INSIDE).removeprefix("vision_model.")
    if key.startswith(_PROJECTOR_INSIDE):
        match = re.fullmatch(r"(\d+\.|)(weight|bias)", key.removeprefix(_PROJECTOR_INSIDE))
        if match is not None and match[1] in _LINEAR:
            return PROJECTOR + _LINEAR[match[1]] + match[2]
    if key.startswith(_TWIG_INSIDE):
        return TWIG + key.removeprefix(_TWIG_INSIDE)
    return TEXT + key


def routed(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return entries of the original format by their places."""
    places = ((route(key), entry) for key, entry in entries.items())
    return {place: entry for place, entry in places if place is not None}


def routed_tower(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of a vision tower's own directory by their places; the rest of CLIP is left out."""
    return {
        TOWER + key.removeprefix("vision_model."): entry
        for key, entry in entries.items()
        if not key.startswith(_CLIP_TEXT) and not key.endswith(_COMPUTED)
    }


def expected_shapes(config: OriginalConfig, tower: CLIPVisionConfig) -> dict[str, Shape]:
    """Return the shapes that the original model's tensors have, by their places."""
    text_config = config.text_config()
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(text_config)
        vision = CLIPVisionModel(tower)
    found = {TEXT + key: tuple(value.shape) for key, value in text.state_dict().items()}
    if text_config.tie_word_embeddings:
        del found[HEAD]
    for key, value in vision.state_dict().items():
        found[TOWER + key.removeprefix("vision_model.")] = tuple(value.shape)
    width, out = tower.hidden_size, text_config.hidden_size
    ins = (
        {"linear_1": width}
        if config.projector == "linear"
        else {"linear_1": width, "linear_2": out}
    )
    for name, features in ins.items():
        found[f"{PROJECTOR}{name}.weight"] = (out, features)
        found[f"{PROJECTOR}{name}.bias"] = (out,)
    return found


def check(
    entries: Mapping[str, Entry], expected: Mapping[str, Shape], config: OriginalConfig
) -> None:
    """Raise `HidropError` unless entries are what is expected: no key more, none less, and each of its shape."""
    unknown = [entry for place, entry in entries.items() if place not in expected]
    if unknown:
        raise HidropError(
            f"{unknown[0].path} holds {unknown[0].key!r}{_more(unknown)}, which this model has no place for: "
            f"mm_projector_type={config.projector!r} over {config.text_type!r} with "
            f"{config.num_layers} layers, and a CLIP vision tower"
        )
    missing = [place for place in expected if place not in entries]
    if missing:
        raise HidropError(
            f"{config.path.parent} holds no weights for {missing[0]!r}{_more(missing)}; a checkpoint of adapters alone needs "
            "base=..., and one without its vision tower the weights in vision_tower=..."
        )
    for place, shape in expected.items():
        entry = entries[place]
        if entry.shape != shape:
            raise HidropError(
                f"{entry.path}: {entry.key!r} has shape {list(entry.shape)}, and {list(shape)} is what {config.path} and the "
                "vision tower make it"
            )


def without_unused(entries: dict[str, Entry], *, tied: bool) -> tuple[dict[str, Entry], list[str]]:
    """Leave out what the authors' loader reads and never uses, and say so."""
    notes = []
    kept = dict(entries)
    for key, why in (
        (NEWLINE, "it stands between tiles, and there are none"),
        *((key, "a draft model takes the model's own") for key in _TWIG_HEAD),
        *((("lm_head.weight", "the config ties it to the embedding"),) if tied else ()),
    ):
        if kept.pop(TEXT + key, None) is not None:
            notes.append(f"{key} is left out: {why}")
    return kept, notes


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
