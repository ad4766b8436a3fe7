"""What a test must know of a class: how to make a tiny model, its pixels, and what a prompt holds for an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 120
PAD, BOS, EOS = 0, 1, 2
SEPARATOR, CLOSING, MARKER = 90, 91, 92
"""Words that stand between the tiles of an image, before its last one, and before it."""
IMAGE_TOKEN, VIDEO_TOKEN = 110, 111

Pixels = Callable[[Any, Sequence[int]], dict[str, Any]]
"""Arguments of the encoder for the items of each row, given how many each row has."""


TokenTypes = Callable[[Sequence[int], Sequence[int]], list[int]]
"""From a row's ids, and their kinds: 0 for words, 1 for images, 2 for videos."""
Sees = Callable[[Sequence[int], int, int, "int | None"], bool]
"""From the types of all tokens of a row, a query, a key and the layer's window: whether the one sees the other."""


def causal(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    return key <= query and (window is None or query - key < window)


def unchanged(logits: Tensor) -> Tensor:
    return logits


def one_entry(number: int) -> int:
    return 1


def plain_run(lengths: Sequence[int], token: int) -> list[int]:
    """The places of an item whose entries follow each other."""
    return [token] * sum(lengths)


def spaced_run(lengths: Sequence[int], token: int) -> list[int]:
    """A word stands before each tile: MARKER t t SEPARATOR t t"""
    ids = [MARKER]
    for length in lengths:
        ids += [token] * length + [SEPARATOR]
    return ids


def two_frames(lengths: Sequence[int], token: int) -> list[int]:
    """The frames of a video, each behind a time and its marker."""
    half = sum(lengths) // 2
    return [MARKER, SEPARATOR] + [token] * half + [CLOSING, SEPARATOR] + [token] * half


def closed_run(lengths: Sequence[int], token: int) -> list[int]:
    """Tiles each behind a word, the last one behind CLOSING."""
    ids = []
    for length in lengths[:-1]:
        ids += [SEPARATOR, MARKER] + [token] * length
    return [*ids, SEPARATOR, CLOSING] + [token] * lengths[-1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One class."""

    name: str
    make: Callable[[], Any]
    images: Pixels
    videos: Pixels | None = None
    entries: Callable[[int], int] = one_entry
    """Entries of the features (tiles) of the image of a number."""
    frames: int = 1
    """Entries of the features of a video."""
    by_row: bool = False
    """The features come as a list for the rows of the batch."""
    ids: Callable[[Sequence[int], int], list[int]] = plain_run
    video_ids: Callable[[Sequence[int], int], list[int]] = plain_run
    deepstack: str = ""
    """Features are added to vision tokens "behind" the first layers, or at the "inputs" of some."""
    typed: bool = False
    """The class wants `mm_token_type_ids`."""
    same_token: bool = False
    """Videos bear the image's token."""
    one_kind: bool = False
    """A call has images or videos, not both."""
    token_types: TokenTypes | None = None
    """Types of a row's tokens, for a class whose masks follow them."""
    sees: Sees = causal
    """The mask of a layer."""
    type_input: str = "mm_token_type_ids"
    """Argument of forward that has the types."""
    new_type: int = 0
    """Type of a token that was generated."""
    counts_padding: bool = False
    """Position ids say more than distances, and `forward` counts them from the first column, padding or not."""
    first_position: int = 0
    """Position id of the first token."""
    adds_features: bool = False
    """Features are added to the embeddings of their places."""
    silent: tuple[int, ...] = ()
    """Words that are embedded as padding."""
    filler: int = 0
    """The token that stands at vision places before."""
    logits: Callable[[Tensor], Tensor] = unchanged
    """Steps behind the head."""
    resized: tuple[str, ...] = ()
    """Weights that are smaller than the class makes them from any configuration."""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "make", _skipped_where_absent(self.make, self.name))


def _skipped_where_absent(make: Callable[[], Any], name: str) -> Callable[[], Any]:
    def made() -> Any:
        try:
            return make()
        except AttributeError as error:
            if "module transformers has no attribute" not in str(error):
                raise
            pytest.skip(f"this transformers has no {name}")

    return made


def text_config(cls: Any, **more: Any) -> Any:
    """A text model of three layers."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return cls(**{**sizes, **more})


def random_model(cls: Any, config: Any) -> Any:
    """A model in eval mode with weights large enough that a wrong token shows."""
    config._attn_implementation = "eager"
    for part in vars(config).values():
        if hasattr(part, "_attn_implementation"):
            part._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        _randomise(model)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    return model.eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    decoder = {id(p) for p in model.get_decoder().parameters()}  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
        elif name.endswith("embed_tokens.weight") and id(parameter) in decoder:
            nn.init.normal_(parameter, 0.0, 1.0)
        elif id(parameter) in decoder or "lm_head" in name:
            nn.init.normal_(parameter, 0.0, 0.25)
        else:
            nn.init.normal_(parameter, 0.0, 0.18)


def random_pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)
