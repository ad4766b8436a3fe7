"""Named model sizes, built with random weights: speed does not depend on what a model has learned."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hidrop_fx.demo import MODEL_DIR


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
    # Less still: what is spent outside the layers.
    "16x64": Size(
        layers=16, width=64, intermediate=128, heads=4, vocabulary=512, dtype=torch.float32
    ),
    "32x64": Size(
        layers=32, width=64, intermediate=128, heads=4, vocabulary=512, dtype=torch.float32
    ),
    "32x512": Size(layers=32, width=512, intermediate=1376, heads=8, dtype=torch.float32),
    "llava-1.5-7b": Size(layers=32, width=4096, intermediate=11008, heads=32),
}

SHIPPED = "shipped"
"""The trained model of the demo, of 144 vision tokens an image."""

IMAGE_TOKEN = 3
IMAGE_SIZE, PATCH = 336, 14
VISION_TOKENS = (IMAGE_SIZE // PATCH) ** 2


def build(size: Size, device: str = "cpu") -> LlavaForConditionalGeneration:
    """Build a LLaVA in eval mode; its tower is as small as can be, since only the decoder is measured."""
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
        num_hidden_layers=2,  # the fewest that have a last but one, which methods look into
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
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


def named(name: str, device: str = "cpu") -> LlavaForConditionalGeneration:
    """Return A size of `SIZES` with random weights, or the shipped model."""
    if name != SHIPPED:
        return build(SIZES[name], device)
    return LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).to(device).eval()


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return another model object over the same parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def prompt(
    model: LlavaForConditionalGeneration, *, batch: int, vision_tokens: int, text_tokens: int
) -> dict[str, object]:
    """Make inputs with ready image features, as `generate` passes them to forward."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    device = model.device
    width = model.config.text_config.hidden_size
    head = text_tokens // 4
    words = (IMAGE_TOKEN + 2, model.config.text_config.vocab_size)  # behind all special tokens
    ids = torch.randint(*words, (batch, text_tokens), device=device)
    image = torch.full((batch, vision_tokens), model.config.image_token_id, device=device)
    input_ids = torch.cat([ids[:, :head], image, ids[:, head:]], dim=1)
    features = torch.randn(batch, vision_tokens, width, device=device, dtype=model.dtype)
    return {
        "input_ids": input_ids,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))},
        "position_ids": torch.arange(input_ids.shape[1], device=device).expand(batch, -1),
    }


def mixed_prompts(
    model: LlavaForConditionalGeneration, rows: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Make a batch padded on the left, as a processor makes it, of rows with (text tokens, images)."""
    vocabulary = model.config.text_config.vocab_size
    width = max(text + images * VISION_TOKENS for text, images in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (text, images) in zip(ids, rows, strict=True):
        vision = images * VISION_TOKENS
        start = width - text - vision
        row[start:] = torch.randint(4, vocabulary, (text + vision,))
        row[start + 1 : start + 1 + vision] = IMAGE_TOKEN
    prompts = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if images := sum(images for _, images in rows):
        prompts["pixel_values"] = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=model.dtype)
    return {name: value.to(model.device) for name, value in prompts.items()}
