"""The schedule that a checkpoint was trained under, from the keys that its authors' code reads.

    late_entry_layer=9, early_exit_layer=25              # 1-based: vision tokens from the ninth layer up to the twenty-fourth
    layer_list=[10,14,16,18]                             # 1-based: prune behind the tenth layer, at the input of the eleventh
    image_token_keep_list=[87,10,5,1]                    # HiDrop: tokens of an image
    image_token_ratio_list=[0.5,0.25,0.125]              # PyramidDrop: shares, rounded down

A layer *behind* a 1-based layer is a 0-based layer's *input*, so that `layer_list` is `Schedule.prune` as it stands, and the other
two keys are one less. The authors' training scripts set them on the model, not in its config.json, so that most
checkpoints have none of them.
"""

import ast
from collections.abc import Mapping
from typing import Any

from hidrop_fx.checkpoints.original_config import OriginalConfig
from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.methods import METHODS
from hidrop_fx.schedule.schedule import Schedule

POSITIONS: dict[str, str] = {
    "exit_topk": "persistent",
    "exit": "persistent",
    "exit_topk_cdp": "compact",
    "exit_sep_topk": "group",
    "topk": "compact",
    "pdrop": "compact",
}
"""How vision tokens were reduced in training -> the rule by which survivors are numbered."""
_LAYERS, _KEEPS, _RATIOS = "layer_list", "image_token_keep_list", "image_token_ratio_list"
_ENTRY, _EXIT = "late_entry_layer", "early_exit_layer"
_TWIG = ("twig_K", "avg_retain_rank", "wipe_layer", "finalwipe_layer")


def schedule_of(config: OriginalConfig, image_tokens: int) -> Schedule | None:
    """Return the schedule of a checkpoint's config.json, or None if it holds none.

    Args:
        image_tokens: of one image. A list that begins with it, or with 1.0, has an entry more, as in the authors' models.

    Raises:
        HidropError: a key has no such value, or another key is missing, or the model has no such layer.
    """
    keys = [k for k in (_ENTRY, _EXIT, _LAYERS, _KEEPS, _RATIOS, *_TWIG) if _given(config, k)]
    if not keys:
        return None
    shown = ", ".join(f"{key}={config.values[key]!r}" for key in keys)
    try:
        if any(key in _TWIG for key in keys):
            schedule = _twig(config)
        else:
            schedule = _pyramid(config, keys, image_tokens)
        schedule.validate(config.num_layers)
    except ScheduleError as error:
        raise HidropError(f"{config.path}: {shown} make no schedule: {error}") from error
    return schedule


def trained_without(config: OriginalConfig) -> HidropError:
    """Return the error for a checkpoint that was trained under a schedule which nobody tells."""
    return HidropError(
        f"{config.path}: model_type={config.values['model_type']!r} was trained with fewer vision tokens, and the file does not say "
        f'in which layers: pass the schedule that it was trained under, such as schedule="hidrop-64" (or '
        '"pyramiddrop"), or schedule="identity" to run it with all tokens'
    )


def _pyramid(config: OriginalConfig, keys: list[str], image_tokens: int) -> Schedule:
    prune = _prune(config, keys, image_tokens)
    entry, exit_ = (_layer(config, key) for key in (_ENTRY, _EXIT))
    late = entry is not None or exit_ is not None
    default = "persistent" if late else "compact"
    fields: dict[str, Any] = {"rounding": "floor"} if _RATIOS in keys else {}
    return Schedule(
        inject=0 if entry is None else entry - 1,
        prune=prune,
        exit=None if exit_ is None else exit_ - 1,
        positions=POSITIONS.get(config.reduced, default),
        **fields,
    )


def _prune(config: OriginalConfig, keys: list[str], image_tokens: int) -> Mapping[int, int | float]:
    """Return filter layer -> keep, of one list of layers and one of keeps."""
    if not {_LAYERS, _KEEPS, _RATIOS} & {*keys}:
        return {}
    if _KEEPS in keys and _RATIOS in keys:
        raise HidropError(
            f"{config.path} holds both {_KEEPS} and {_RATIOS}: remove one, or pass schedule=..."
        )
    name = _RATIOS if _RATIOS in keys else _KEEPS
    for key in (_LAYERS, name):
        if key not in keys:
            other = f"{key} or {_RATIOS}" if key == _KEEPS else key
            raise HidropError(
                f"{config.path} has {', '.join(keys)}, and no {other}; pass schedule=..."
            )
    layers, keeps = _list(config, _LAYERS), _list(config, name)
    if len(keeps) == len(layers) + 1 and keeps[0] == (1.0 if name == _RATIOS else image_tokens):
        keeps = keeps[1:]
    if len(layers) != len(keeps) or len({*layers}) < len(layers):
        raise HidropError(
            f"{config.path}: {_LAYERS}={layers} and {name}={keeps}: one keep belongs to each layer, and each layer comes once"
        )
    found: dict[int, int | float] = {}
    for layer, keep in zip(layers, keeps, strict=True):
        if not isinstance(layer, int) or layer < 1:
            raise HidropError(f"{config.path}: {_LAYERS}={layers}: layers are ints from 1 on")
        if name == _KEEPS and not isinstance(keep, int):
            raise HidropError(f"{config.path}: {_KEEPS}={keeps}: numbers of tokens are ints")
        # A ratio of 1 would be one token.
        found[layer] = float(keep) if name == _RATIOS else keep
    return found


def _twig(config: OriginalConfig) -> Schedule:
    """Return TwigVLM's schedule, its own defaults where a key is missing."""
    given: dict[str, Any] = {}
    if _given(config, "twig_K"):
        given["layer"] = _layer(config, "twig_K")
    if _given(config, "avg_retain_rank"):
        given["average"] = config.values["avg_retain_rank"]
    wipes = _list(config, "wipe_layer") if _given(config, "wipe_layer") else []
    if _given(config, "finalwipe_layer"):
        given["exit"] = _layer(config, "finalwipe_layer")
    elif wipes:
        given["exit"] = wipes[-1]
    return Schedule(**METHODS["twigvlm"](**given))


def _given(config: OriginalConfig, key: str) -> bool:
    return config.values.get(key) is not None


def _layer(config: OriginalConfig, key: str) -> int | None:
    value = _literal(config, key) if _given(config, key) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HidropError(f"{config.path}: {key}={value!r}: layers are ints from 1 on")
    return value


def _list(config: OriginalConfig, key: str) -> list[int | float]:
    value = _literal(config, key)
    numbers = isinstance(value, list | tuple) and all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in value
    )
    if not numbers:
        raise HidropError(f"{config.path}: {key}={value!r} is no list of numbers")
    return list(value)


def _literal(config: OriginalConfig, key: str) -> Any:
    """Return a value that may be written as text, "[10,14,16,18]", as on the authors' command lines."""
    value = config.values[key]
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError) as error:
        raise HidropError(f"{config.path}: {key}={value!r} cannot be read: {error}") from error
