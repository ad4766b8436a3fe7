"""Models without weights: all their shapes, on fake tensors, in no memory.

model = weightless_model(load_config("llava-hf/llava-1.5-7b-hf"))
"""

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaConfig

from hidrop_fx.errors import HidropError
from hidrop_fx.planning.geometry import Geometry

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def weightless_model(config: Any, *, dtype_bytes: int = 2) -> Any:
    """Make the model of a config, in eval mode, to be traced and not to be called.

    Args:
        config: of a transformers VLM.
        dtype_bytes: 2 for bfloat16, 4 for float32.

    Raises:
        HidropError: the config is of no class that takes images and text, or the dtype is another.
    """
    dtype = _DTYPES.get(dtype_bytes)
    if dtype is None:
        raise HidropError(
            f"dtype_bytes={dtype_bytes}: a program is made in 16 bits (2) or in 32 (4)"
        )
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            # It writes its choice of attention into the config.
            model: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    except (ValueError, AttributeError) as error:
        raise HidropError(
            f"no model can be made from a {type(config).__name__}: {' '.join(str(error).split())}. Pass the config "
            "of a vision-language model of transformers, or the model"
        ) from error
    return model.eval()


def llava_config(geometry: Geometry) -> LlavaConfig:
    """Return the config of a LLaVA whose decoder, a Llama, has these sizes."""
    g = geometry
    text = LlamaConfig(
        num_hidden_layers=g.num_layers,
        hidden_size=g.hidden_size,
        intermediate_size=g.intermediate_size,
        num_attention_heads=g.num_attention_heads,
        num_key_value_heads=g.num_key_value_heads,
        head_dim=g.head_dim,
        vocab_size=max(g.vocab_size, 1000),
    )
    return LlavaConfig(text_config=text, image_token_index=1)
