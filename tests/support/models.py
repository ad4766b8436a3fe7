"""Tiny random LLaVA models, padded batches and hypothesis strategies for the tests.

    model = tiny_llava("qwen2", num_layers=4, sliding_window=6)
    inputs = batch(model, [[5, 6, IMAGE, 7], [8, 9]], padding="left")
    model.generate(**inputs, max_new_tokens=4)

The weights are large on purpose: with the usual std of 0.02 attention is uniform, every vision token scores the same and
every prompt continues alike, so that a wrong token, position or mask would not show in the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

BACKBONES: Final = ("llama", "mistral", "qwen2", "qwen3")
IMAGE: Final = "<image>"
"""Stands for one whole image in a row of `batch`."""

VOCAB: Final = 97
PAD, BOS, EOS, IMAGE_TOKEN = 0, 1, 2, VOCAB - 1
FIRST_WORD: Final = 3
PATCH: Final = 4
IGNORE: Final = -100

Row = Sequence[int | str]
"""Token ids and `IMAGE` markers."""

Make = Callable[..., Any]
"""The type of the fixtures `plain` and `compiled`."""

PRUNED: Final = "inject=1,prune=1:6+2:3,exit=3"
"""A schedule for four layers in which everything happens."""


def tiny_llava(
    backbone: str = "llama",
    *,
    num_layers: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    kv_heads: int | None = None,
    sliding_window: int | None = None,
    image_tokens: int = 9,
    hidden_size: int = 32,
    heads: int = 4,
    vision: PreTrainedConfig | None = None,
    **config_options: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA in eval mode with reproducible random weights; the caller's random state is left alone.

    `vision` is the config of another tower than CLIP's, `config_options` further fields of the config.

    `sliding_window` holds for every layer of Mistral and for every second layer (1, 3, ...) of Qwen.
    """
    side = math.isqrt(image_tokens)
    if side * side != image_tokens:
        raise ValueError(f"image_tokens={image_tokens} is no square: an image is a grid of patches")
    text = _text_config(
        backbone,
        sliding_window,
        num_layers=num_layers,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
    )
    clip = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision or clip,
        **{
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": image_tokens,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            **config_options,
        },
    )
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _randomise(model)
    for parameter in model.parameters():
        # Like from_pretrained, and unlike model.to(dtype), this leaves the RoPE frequencies in fp32.
        parameter.data = parameter.data.to(dtype)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    return model.eval()


def _text_config(
    backbone: str,
    sliding_window: int | None,
    *,
    num_layers: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    if backbone == "mistral":
        return MistralConfig(**common, sliding_window=sliding_window)
    if backbone in ("qwen2", "qwen3"):
        if sliding_window is not None:
            kinds = ("full_attention", "sliding_attention")
            common |= {
                "use_sliding_window": True,
                "sliding_window": sliding_window,
                "layer_types": [kinds[k % 2] for k in range(num_layers)],
            }
        if backbone == "qwen2":
            return Qwen2Config(**common)
        return Qwen3Config(**common, head_dim=hidden_size // heads)
    if backbone != "llama":
        raise ValueError(f"unknown backbone {backbone!r}: one of {', '.join(BACKBONES)}")
    if sliding_window is not None:
        raise ValueError("Llama has no sliding window: take mistral, qwen2 or qwen3")
    return LlamaConfig(**common)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, 0.0, 1.0)
        elif "vision_tower" in name or "projector" in name:
            # So that features are of the size of word embeddings, and the layers' updates count for both.
            nn.init.normal_(parameter, 0.0, 0.18)
        else:
            nn.init.normal_(parameter, 0.0, 0.25)


def batch(
    model: LlavaForConditionalGeneration,
    rows: Sequence[Row],
    *,
    padding: Literal["left", "right"] = "left",
    pad_to: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, if there is any image, `pixel_values` (all images, row-major)."""
    config: Any = model.config
    per_image = config.image_seq_length
    expanded = [
        [
            token
            for item in row
            for token in ([IMAGE_TOKEN] * per_image if item == IMAGE else [item])
        ]
        for row in rows
    ]
    width = max(pad_to or 0, *(len(row) for row in expanded))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, tokens in enumerate(expanded):
        start = width - len(tokens) if padding == "left" else 0
        ids[b, start : start + len(tokens)] = torch.tensor(tokens)
        mask[b, start : start + len(tokens)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images := sum(item == IMAGE for row in rows for item in row):
        size = config.vision_config.image_size
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(images, 3, size, size, generator=generator)
        inputs["pixel_values"] = pixels.to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def random_labels(inputs: dict[str, Tensor], *, seed: int = 0, spans: int = 2) -> Tensor:
    """Labels with up to `spans` supervised runs per row, on words only (never on images or pads)."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
    labels = torch.full_like(ids, IGNORE)
    for b in range(ids.shape[0]):
        words = (mask[b] & (ids[b] != IMAGE_TOKEN)).nonzero().flatten()
        for _ in range(spans if len(words) else 0):
            first = int(torch.randint(len(words), (), generator=generator))
            count = int(torch.randint(1, 4, (), generator=generator))
            chosen = words[first : first + count]
            labels[b, chosen] = ids[b, chosen]
    return labels.to(inputs["input_ids"].device)


def supervised(
    model: LlavaForConditionalGeneration,
    rows: Sequence[Row],
    *,
    seed: int = 0,
    label_seed: int = 0,
    spans: int = 2,
    first_column: bool = True,
) -> dict[str, Tensor]:
    """Return a batch padded on the right with random labels; at the first column too, if wanted."""
    inputs = batch(model, rows, padding="right", seed=seed)
    labels = random_labels(inputs, seed=label_seed, spans=spans)
    if not first_column:
        labels[:, 0] = IGNORE
    return inputs | {"labels": labels}


@st.composite
def schedules(
    draw: st.DrawFn,
    num_layers: int,
    *,
    image_tokens: int = 9,
    positions: Sequence[str] = ("persistent", "compact", "group"),
    scores: Sequence[str] = ("last_token",),
) -> dict[str, Any]:
    """Keyword arguments of a valid schedule: at most 3 filter layers, keeps non-increasing within one type.

    A score that reads the layer before the filter layer prunes behind the injection alone.

    Reaches: counts above what is there, fractions that end in .5, a prune at `inject`, an exit right after a prune,
    `exit == num_layers`, no exit, no prune.
    """
    inject = draw(st.integers(0, num_layers - 1))
    exit_ = draw(st.none() | st.integers(inject + 1, num_layers))
    last = num_layers if exit_ is None else exit_
    score = draw(st.sampled_from(list(scores)))
    first = inject + (score in ("previous_layer", "state_change"))
    layers = []
    if first < last:
        layers = sorted(draw(st.sets(st.integers(first, last - 1), max_size=3)))
    counts = st.integers(1, image_tokens + 4)
    fractions = st.sampled_from([0.05, 0.1, 0.15, 0.25, 1 / 3, 0.35, 0.5, 0.75, 0.9, 1.0])
    keeps = sorted(
        draw(st.lists(counts | fractions, min_size=len(layers), max_size=len(layers))), reverse=True
    )
    return {
        "inject": inject,
        "prune": dict(zip(layers, _descend_by_type(keeps, draw), strict=True)),
        "exit": exit_,
        "positions": draw(st.sampled_from(list(positions))),
        "score": score,
        "rounding": draw(st.sampled_from(["half_up", "half_even", "floor"])),
    }


def _descend_by_type(keeps: list[int | float], draw: st.DrawFn) -> list[int | float]:
    """Interleave counts and fractions in any order, each of the two descending."""
    counts = [keep for keep in keeps if isinstance(keep, int)]
    fractions = [keep for keep in keeps if isinstance(keep, float)]
    turns = draw(st.permutations([int] * len(counts) + [float] * len(fractions)))
    return [counts.pop(0) if turn is int else fractions.pop(0) for turn in turns]


@st.composite
def rows(
    draw: st.DrawFn, *, max_rows: int = 3, max_images: int = 3, max_words: int = 4
) -> list[list[int | str]]:
    """Rows for `batch`: none, one or several images each, anywhere, also first, last, adjacent or alone."""
    words = st.lists(st.integers(FIRST_WORD, IMAGE_TOKEN - 1), max_size=max_words)

    def row(images: int) -> st.SearchStrategy[list[int | str]]:
        gaps = st.lists(words, min_size=images + 1, max_size=images + 1)
        return gaps.map(_join).filter(bool)

    return draw(st.lists(st.integers(0, max_images).flatmap(row), min_size=1, max_size=max_rows))


def _join(gaps: list[list[int]]) -> list[int | str]:
    joined: list[int | str] = list(gaps[0])
    for gap in gaps[1:]:
        joined += [IMAGE, *gap]
    return joined
