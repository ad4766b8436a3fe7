"""Text models as transformers' configuration classes have them by default, smaller in depth and width alone.

    model = with_default_text(CASES["kimi_k25"])

Counts of experts and of their groups, caps, multipliers, windows, biases and RoPE's base are the class's own, which its
authors took from a checkpoint; the tower and the prompt are those of the case.
"""

from __future__ import annotations

from typing import Any

from tests.support.families.case import Case, random_model

NAMES = (
    "got_ocr2", "cohere2_vision_cohere2", "granite_docling", "qwen3_vl_moe", "glm46v", "glm_ocr",
    "exaone4_5", "paddleocr_vl", "muse_glimmer", "muse_spark", "kimi_k25", "cosmos3_edge", "cosmos3_omni",
    "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "glm4v_moe", "gemma4_unified", "molmo2",
    "hunyuan_vl", "lfm2_vl", "lfm3_vl", "aria", "fuyu", "lighton_ocr", "hyperclovax_vision_v2", "idefics2",
)  # fmt: skip
"""Classes whose text model has a configuration of its own, and none in `checkpoints.py`."""

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "additional_vocab_size", "moe_intermediate_size", "moe_hidden_size", "kv_lora_rank", "q_lora_rank",
    "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
)  # fmt: skip
_LAYERS = (
    "layer_types", "mlp_layer_types", "layer_rope_theta", "rope_scaling_layers", "per_layer_config",
    "first_k_dense_replace", "full_attn_idxs",
)  # fmt: skip
_OURS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "model_type", "tie_word_embeddings", "dtype", "architectures",
    # What makes a class one that can be scheduled.
    "hidden_size_per_layer_input", "use_bidirectional_attention", "num_kv_shared_layers",
    "block_auto_adjust_ff_dim",
)  # fmt: skip


def with_default_text(case: Case) -> Any:
    """The case's model over a text model with the default values of its configuration class."""
    model = case.make()
    config = model.config
    own = config.get_text_config()
    default = type(own)()
    kept = {*_SIZES, *_LAYERS, *_OURS, "rope_parameters"}
    for name, value in default.to_dict().items():
        if name not in kept and not name.startswith(("_", "attn_impl", "transformers_version")):
            setattr(own, name, value)
    rope, given = own.rope_parameters or {}, default.rope_parameters or {}
    if "rope_theta" in rope and "rope_theta" in given:
        own.rope_parameters = {**rope, "rope_theta": given["rope_theta"]}
    return random_model(type(model), config)
