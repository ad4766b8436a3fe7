"""A model of three layers in a directory, and a LLaVA JSON file of questions whose answers are its own plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from hidrop_fx.demo.build import build_config, build_processor
from hidrop_fx.demo.pictures import picture, questions
from hidrop_fx.models.prompts import chat_inputs, greedy_answer

LAYERS, NEW_TOKENS = 3, 3


def write_model(directory: Path) -> Path:
    """Write a model with random weights, large enough to tell questions apart."""
    config = build_config()
    config.text_config.num_hidden_layers = LAYERS
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    processor = build_processor()
    model.generation_config.suppress_tokens = (
        processor.tokenizer.all_special_ids
    )  # answers are words
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def write_questions(directory: Path, model_directory: Path, count: int) -> Path:
    """Write pictures and questions about them, each answered by plain transformers, one at a time."""
    model = LlavaForConditionalGeneration.from_pretrained(model_directory).eval()
    processor = build_processor()
    entries = []
    for seed in range(count):
        drawn = picture(seed, "test")
        drawn.image.save(directory / f"{seed}.png")
        sentence = questions(drawn, seed)[seed % 3].sentence
        inputs = chat_inputs(model, processor, [drawn.image], sentence)
        answer = greedy_answer(model, processor, inputs, NEW_TOKENS)
        turns = [
            {"from": "human", "value": f"<image>\n{sentence}"},
            {"from": "gpt", "value": answer},
        ]
        entries.append({"image": f"{seed}.png", "conversations": turns})
    path = directory / "questions.json"
    path.write_text(json.dumps(entries))
    return path
