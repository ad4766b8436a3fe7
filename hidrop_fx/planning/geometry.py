"""The sizes of a model that costs depend on, read off the model or its config."""

from dataclasses import dataclass, fields
from typing import Any

from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.methods.needs import TWIG_LAYERS
from hidrop_fx.planning.layer_kinds import ATTENDING, LayerKind, layer_kinds
from hidrop_fx.schedule.keeps import checked_int

_DEFAULT_HEAD_DIM = 128

MODULES = "hidrop_modules"
"""Attribute of a model under which the modules that `compile` was given are found."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a text decoder that the costs of a plan depend on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """0 leaves the output head out of the costs."""
    dtype_bytes: int
    twig_layers: int = TWIG_LAYERS
    """Of the side branch, where a score reads one."""
    kinds: tuple[LayerKind, ...] = ()
    """What each layer computes, where not all attend and have a gated MLP; empty where all do."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name == "kinds":  # as they are read back from JSON, too
                kinds = (k if isinstance(k, LayerKind) else LayerKind(**k) for k in self.kinds)
                object.__setattr__(self, "kinds", tuple(kinds))
                continue
            minimum = 0 if f.name == "vocab_size" else 1
            value = checked_int(getattr(self, f.name), f.name, minimum=minimum)
            object.__setattr__(self, f.name, value)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ScheduleError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: query heads share key-value heads "
                "in groups of equal size"
            )

    def kind(self, layer: int) -> LayerKind:
        """Return what a layer computes; of one beyond those that are told (`num_layers=` of a plan), attention and MLP."""
        return self.kinds[layer] if layer < len(self.kinds) else ATTENDING

    @classmethod
    def from_model(cls, model: Any) -> "Geometry":
        """Read the geometry of a Hugging Face model's (or config's) text decoder."""
        sizes = sizes_of(model)
        missing = [f.name for f in fields(cls) if sizes.get(f.name) is None]
        if missing:
            raise UnsupportedModelError(
                f"the text config of {type(model).__name__} does not tell {', '.join(missing)}: "
                "give them to plan() as keywords"
            )
        return cls(**sizes)


def sizes_of(model: Any) -> dict[str, Any]:
    """Read the sizes of a text decoder off a model or config, under the names of `Geometry`."""
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config with get_text_config(): pass a Hugging Face "
            "model or config, or the sizes as keywords"
        )
    text = config.get_text_config()
    twig = getattr(getattr(model, MODULES, None), "twig", None)
    sizes: dict[str, Any] = {
        "twig_layers": TWIG_LAYERS if twig is None else len(twig),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "intermediate_size": getattr(text, "intermediate_size", None),
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_key_value_heads": getattr(text, "num_key_value_heads", None),
        "head_dim": getattr(text, "head_dim", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "dtype_bytes": getattr(getattr(model, "dtype", None), "itemsize", 2),
        "kinds": layer_kinds(text),
    }
    shared = getattr(text, "shared_intermediate_size", None)
    if shared and not getattr(text, "num_local_experts", None):  # Granite's hybrids without experts
        sizes["intermediate_size"] = shared
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = heads
    if sizes["head_dim"] is None and heads and hidden and hidden % heads == 0:
        sizes["head_dim"] = hidden // heads
    return {name: value for name, value in sizes.items() if value is not None}


def sparse_parts(model: Any) -> list[str]:
    """Name what a text config has that `Geometry` does not describe: experts, latent keys and values, convolutions."""
    text = getattr(model, "config", model).get_text_config()
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    parts = {
        "experts": experts,
        "latent keys and values": ("kv_lora_rank",),
        "convolutions": ("conv_L_cache",),
    }
    return [part for part, names in parts.items() if any(getattr(text, n, None) for n in names)]


def depth_of(model: Any) -> int:
    """Return the number of layers of a Hugging Face model's (or config's) text decoder."""
    depth: int = getattr(model, "config", model).get_text_config().num_hidden_layers
    return depth


def with_defaults(sizes: dict[str, Any]) -> dict[str, Any]:
    """Complete sizes by name: as many key-value heads as heads, their widths, two bytes a value."""
    hidden = checked_int(sizes["hidden_size"], "hidden_size", minimum=1)
    heads, width = sizes.get("num_attention_heads"), sizes.get("head_dim")
    if heads is None:
        width = checked_int(width or _DEFAULT_HEAD_DIM, "head_dim", minimum=1)
        heads = hidden // width if hidden % width == 0 else 1
    heads = checked_int(heads, "num_attention_heads", minimum=1)
    if sizes.get("head_dim") is None and hidden % heads:
        raise ScheduleError(
            f"hidden_size={hidden} is no multiple of num_attention_heads={heads}: pass head_dim=..."
        )
    defaults = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "vocab_size": 0,
        "dtype_bytes": 2,
    }
    return defaults | sizes


def vision_tokens_per_image(model: Any) -> int | None:
    """Return the number of vision tokens of one image, or None where it depends on the image.

    The config's `image_seq_length` stays at 576 whatever the tower, so a tower that is known to
    give one token a patch is asked first.
    """
    config = getattr(model, "config", model)
    vision = getattr(config, "vision_config", None)
    if getattr(config, "model_type", "llava") != "llava":
        return (
            None  # other classes merge, pad or repeat what their tower gives, each in its own way
        )
    varies = varying_patches(config) is not None
    if varies or getattr(config, "image_grid_pinpoints", None) is not None:
        return None
    patches, extra = _patches(vision), _extra_tokens(vision)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if patches is not None and extra is not None and strategy in ("default", "full"):
        return patches + extra - (strategy == "default")
    if getattr(config, "model_type", None) == "llava" and extra is None:
        return None  # nothing of LLaVA reads `image_seq_length`
    return getattr(config, "image_seq_length", None)


def varying_patches(model: Any) -> int | None:
    """Return the pixels of a patch's side where images have as many tokens as patches; None for other towers."""
    config = getattr(model, "config", model)
    vision: Any = getattr(config, "vision_config", None)
    merged = getattr(config, "model_type", "llava") != "llava"  # several patches make a token
    if merged or getattr(vision, "model_type", None) not in _ANY_SIZE:
        return None
    found: int = vision.patch_size
    return found


def largest_image(model: Any) -> int | None:
    """Return the vision tokens of the largest image, where a tower takes images of any size up to one."""
    vision = getattr(getattr(model, "config", model), "vision_config", None)
    return None if varying_patches(model) is None else _patches(vision)


# Towers for images of any size, a token a patch.
_ANY_SIZE = ("pixtral",)
# Towers with a token a patch behind some of their own, by model type.
_OWN_TOKENS = {
    "siglip_vision_model": 0,
    "ijepa": 0,
    "clip_vision_model": 1,
    "dinov2": 1,
    "vit": 1,
    "deit": 2,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}


def _patches(vision: Any) -> int | None:
    image_size, patch_size = (getattr(vision, f"{what}_size", None) for what in ("image", "patch"))
    if isinstance(image_size, int) and isinstance(patch_size, int):
        return (image_size // patch_size) ** 2
    return None


def _extra_tokens(vision: Any) -> int | None:
    """Return the tokens that a tower adds to those of the patches; None for a tower that is not known."""
    own = _OWN_TOKENS.get(getattr(vision, "model_type", None) or "")
    return None if own is None else own + int(getattr(vision, "num_register_tokens", 0) or 0)
