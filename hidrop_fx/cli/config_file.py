"""The sizes in a LLaVA's config.json, read without transformers, whose import takes seconds.

A config file leaves out what is at its class's default, which transformers alone knows: a file counts here
only if it states every size that a plan depends on.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_TEXT_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_config(directory: str) -> Any:
    """Return the config of a LLaVA directory as an object that `plan` takes, or None.

    None where there is no such file, or one that says less than a plan needs; `load_config` of
    `hidrop_fx.models.loading` knows the defaults, and what is wrong.
    """
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        text, vision = config["text_config"], config["vision_config"]
        complete = config["model_type"] == "llava" and all(text[name] for name in _TEXT_SIZES)
        tower = {name: vision[name] for name in ("model_type", "image_size", "patch_size")}
        strategy = config["vision_feature_select_strategy"]
        bytes_each = _DTYPE_BYTES[config["dtype"]]
        tokens = config["image_seq_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not complete:
        return None
    sizes = SimpleNamespace(**{name: text[name] for name in _TEXT_SIZES})
    return SimpleNamespace(
        get_text_config=lambda: sizes,
        vision_config=SimpleNamespace(**tower),
        vision_feature_select_strategy=strategy,
        image_seq_length=tokens,
        dtype=SimpleNamespace(itemsize=bytes_each),
    )
