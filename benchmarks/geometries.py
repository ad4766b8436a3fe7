"""Named model sizes, built with random weights: speed does not depend on what a model has learned."""

import copy
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama decoder behind a tower that gives `vision_tokens` tokens an image."""

    layers: int
    width: int
    intermediate: int
    heads: int
    vocabulary: int = 32064
    dtype: torch.dtype = torch.bfloat16


SIZES: dict[str, Size] = {
    # For a quick look that the script runs.
    "tiny": Size(
        layers=4, width=64, intermediate=128, heads=4, vocabulary=512, dtype=torch.float32
    ),
    "16x2048": Size(layers=16, width=2048, intermediate=5504, heads=16),
    # Thirty-two small layers: what compilation costs, not what the arithmetic does.
    "32x256": Size(layers=32, width=256, intermediate=688, heads=4, dtype=torch.float32),
    "32x512": Size(layers=32, width=512, intermediate=1376, heads=8, dtype=torch.float32),
    "llava-1.5-7b": Size(layers=32, width=4096, intermediate=11008, heads=32),
}

IMAGE_TOKEN = 3


def build(size: Size, device: str = "cpu") -> LlavaForConditionalGeneration:
    """A LLaVA in eval mode; its tower is as small as can be, since only the decoder is measured."""
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        projection_dim=32,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Another model object over the same parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def prompt(
    model: LlavaForConditionalGeneration, *, batch: int, vision_tokens: int, text_tokens: int
) -> dict[str, object]:
    """Inputs with ready image features, as `generate` hands them to forward."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    device = model.device
    width = model.config.text_config.hidden_size
    head = text_tokens // 4
    ids = torch.randint(4, model.config.text_config.vocab_size, (batch, text_tokens), device=device)
    image = torch.full((batch, vision_tokens), IMAGE_TOKEN, device=device)
    input_ids = torch.cat([ids[:, :head], image, ids[:, head:]], dim=1)
    features = torch.randn(batch, vision_tokens, width, device=device, dtype=model.dtype)
    return {
        "input_ids": input_ids,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))},
        "position_ids": torch.arange(input_ids.shape[1], device=device).expand(batch, -1),
    }
