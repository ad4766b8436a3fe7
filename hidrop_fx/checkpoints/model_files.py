"""The files of a model beside its weights: config, generation config, tokenizer, processor, chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig

from hidrop_fx.checkpoints.chat_templates import chat_template
from hidrop_fx.checkpoints.original_config import OriginalConfig, read_json
from hidrop_fx.checkpoints.towers import PREPROCESSOR, Tower, image_settings
from hidrop_fx.checkpoints.vocabulary import IMAGE


def write_config(
    directory: Path,
    config: OriginalConfig,
    tower: Tower,
    tokenizer: Any,
    rows: int,
    dtype: torch.dtype,
    image_tokens: int,
) -> None:
    """Write config.json and generation_config.json; `rows` are those of the embedding, `image_tokens` those of an image."""
    pad = tokenizer.pad_token_id
    text = config.text_config(vocab_size=rows, pad_token_id=pad)
    made = LlavaConfig(
        text_config=text,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=image_tokens,
        projector_hidden_act="linear" if config.projector == "linear" else "gelu",
        vision_feature_select_strategy=config.strategy,
        vision_feature_layer=config.select_layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    made.pad_token_id = pad
    made.architectures = ["LlavaForConditionalGeneration"]
    made.dtype = dtype
    made.save_pretrained(directory)
    path = config.path.parent / "generation_config.json"
    ends: Mapping[str, Any] = read_json(path, "") if path.is_file() else {}
    GenerationConfig(
        bos_token_id=ends.get("bos_token_id", text.bos_token_id),
        eos_token_id=ends.get("eos_token_id", text.eos_token_id),
        pad_token_id=pad,
    ).save_pretrained(directory)


def write_processor(directory: Path, config: OriginalConfig, tower: Tower, tokenizer: Any) -> None:
    """Write what `AutoProcessor` reads."""
    tokenizer.save_pretrained(directory)
    template = chat_template(config.text_type, wrapped=config.wrapped)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": tower.config.patch_size,
        "vision_feature_select_strategy": config.strategy,
    }
    images = {
        **image_settings(tower, pads=config.pads_to_square),
        "processor_class": "LlavaProcessor",
    }
    for name, values in (("processor_config.json", processor), (PREPROCESSOR, images)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
