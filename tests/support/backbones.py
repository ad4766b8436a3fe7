"""Tiny random LLaVAs over text decoders of every kind that transformers has.

model = tiny_backbone("gemma2")
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support.models import BOS, EOS, IMAGE_TOKEN, PAD, PATCH, VOCAB

LAYERS: Final = 4
_SIDE = 3
_WINDOW = 7
_KINDS = ["full_attention", "sliding_attention"] * (LAYERS // 2)
_SHORT = ["conv", "full_attention", "full_attention", "conv"]
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
_SPACE: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_d_conv": 3,
}
_NEMOTRON: dict[str, Any] = {
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 6,
    "conv_kernel": 3,
    "chunk_size": 4,
    "time_step_min": 1e-9,  # no bound, whose log the class takes
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

TEXT: Final[dict[str, dict[str, Any]]] = {
    "phi3": {},
    "gemma": {"head_dim": 16},
    "stablelm": {},
    "stablelm_parallel": {
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "use_qkv_bias": True,
    },
    "cohere": {"use_qk_norm": True},
    "olmo2": {},
    "cohere2": {"layer_types": _KINDS, "sliding_window": _WINDOW},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "smollm3_window": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "layer_types": _KINDS,
    },
    "starcoder2": {"sliding_window": _WINDOW},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "gemma3_text": {
        "head_dim": 16,
        "layer_types": _KINDS,
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 16,
    },
    "gemma2": {
        "head_dim": 16,
        "layer_types": _KINDS,
        "sliding_window": _WINDOW,
        "attn_logit_softcapping": 1.5,
    },
    "gpt_oss": {
        "head_dim": 16,
        "layer_types": _KINDS,
        "sliding_window": _WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": {"layer_types": _SHORT, "conv_L_cache": 3},
    "lfm2_moe": {
        "layer_types": _SHORT,
        "conv_L_cache": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    "lfm3": {
        "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
        "conv_L_cache": 7,
        "sliding_window": _WINDOW,
        "head_dim": 16,
    },
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "qwen3_next": {
        **_MOE,
        **_DELTA,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "bamba": {**_SPACE, "attn_layer_indices": [1, 2], "mamba_chunk_size": 4},
    "granitemoehybrid": {
        **_SPACE,
        "layer_types": _DELTA["layer_types"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "position_embedding_type": "rope",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "mamba_chunk_size": 4,
    },
    "granitemoehybrid_dense": {
        **_SPACE,
        "model_type": "granitemoehybrid",
        "layer_types": _DELTA["layer_types"],
        "num_local_experts": 0,
        "shared_intermediate_size": 24,
        "mamba_chunk_size": 5,
    },
    "falcon_h1": {
        **_SPACE,
        "mamba_d_ssm": 64,
        "mamba_chunk_size": 4,
        "key_multiplier": 0.7,
        "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 0.7],
        "attention_in_multiplier": 0.9,
        "ssm_out_multiplier": 0.6,
        "embedding_multiplier": 2.0,
    },
    "nemotron_h": {
        **_NEMOTRON,
        "layers_block_type": ["linear_attention", "full_attention", "full_attention", "moe"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral_loop": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen2_moe_window": {
        **_MOE,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "layer_types": _KINDS,
    },
    "qwen3_moe": {**_MOE, "num_experts": 4, "head_dim": 16, "norm_topk_prob": True},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "deepseek_v2": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        **_MOE,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}
"""What differs from the smallest config, by a name that is the `model_type` unless it gives one."""


APART: Final[dict[str, dict[str, Any]]] = {
    "lfm2_bias": {
        "model_type": "lfm2",
        "layer_types": _SHORT,
        "conv_L_cache": 3,
        "conv_bias": True,
    },
    "qwen3_5_interval": {
        **_DELTA,
        "model_type": "qwen3_5_text",
        "head_dim": 16,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 5,
        "mamba_d_conv": 3,
        "mamba_dt_rank": 4,
    },
    "nemotron_h_between": {
        **_NEMOTRON,
        "model_type": "nemotron_h",
        "layers_block_type": ["mlp", "full_attention", "mlp", "linear_attention"],
    },
    "bamba_bounded": {
        **_SPACE,
        "model_type": "bamba",
        "attn_layer_indices": [1, 2],
        "mamba_chunk_size": 4,
        "time_step_limit": (0.4, 0.9),
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2),
        "mamba_d_state": 6,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "num_mem_blocks": 1,
    },
}
"""Those of a test of their own: whose rows transformers computes in another way where they are padded, or whose layers are
in another order."""


def text_config(name: str) -> Any:
    """Return the config of a decoder of four layers, 32 wide, with grouped heads where it can have them."""
    given = dict({**TEXT, **APART}[name])
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(given.pop("model_type", name), **(common | given))


def tiny_backbone(name: str, *, seed: int = 0) -> Any:
    """Return a LLaVA in eval mode with large reproducible random weights over the decoder `TEXT[name]`."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=_SIDE * PATCH,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text_config(name),
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=_SIDE**2,
        vision_feature_layer=-2,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config).float()
        _randomise(model)
    if name.endswith("_loop"):
        model.config.text_config._experts_implementation = "eager"
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    return model.eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
        elif name.endswith("embed_tokens.weight") or name.endswith("sinks"):
            nn.init.normal_(parameter, 0.0, 1.0)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, 0.0, 0.1)
        else:
            nn.init.normal_(parameter, 0.0, 0.18)
