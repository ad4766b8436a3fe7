"""The decoder run by hand under a schedule, with many questions about one picture at once.

The questions about a picture share its tokens: while nothing depends on the question, the layout is
``prefix, vision tokens, question 1, question 2, ...`` and a mask keeps questions from seeing one
another. The first pruning step separates them into sequences of their own, because each keeps
other vision tokens. Every token carries the position it has in the plain sequence of its own
question throughout, so the results are those of one sequence a question.

Shapes: B pictures, S questions a picture, T tokens a question, V vision tokens, D width, L columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SHARED = -1


@dataclass(frozen=True)
class PackedSchedule:
    """Vision tokens join at ``inject``, shrink at the layers of ``prune`` and leave at ``exit``."""

    inject: int = 0
    prune: Mapping[int, int] = field(default_factory=dict)
    exit: int = 10**9


IDENTITY = PackedSchedule()


@dataclass(frozen=True)
class PackedText:
    """Token ids around the image: ``prefix`` [P] and ``questions`` [B, S, T], padded at the end.

    ``asked`` [B, S] is the index in T of each last prompt token. ``whole`` [B, W] is one longer
    question more, for plans that do not prune; W may be 0.
    """

    prefix: torch.Tensor
    questions: torch.Tensor
    asked: torch.Tensor
    whole: torch.Tensor


@dataclass(frozen=True)
class PackedTokens:
    """The states between two layers.

    ``hidden`` [N, L, D], ``positions`` [N or 1, L], ``owners`` [L] (the question of each column, or
    ``SHARED``); the vision tokens are the ``vision`` columns from ``start`` on.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    owners: torch.Tensor
    start: int
    vision: int

    @property
    def allowed(self) -> torch.Tensor:
        """Mask of the columns that each row may see, [N or 1, L, L] bool."""
        earlier = self.positions[:, None, :] <= self.positions[:, :, None]
        shared = self.owners == SHARED
        return earlier & (shared[None, :] | (self.owners[None, :] == self.owners[:, None]))


def run_decoder(
    model: LlavaForConditionalGeneration,
    text: PackedText,
    vision: torch.Tensor,
    schedule: PackedSchedule,
    patches: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the normed last states of the question tokens and of ``whole``, [B, S * T + W, D].

    ``vision`` [B, V, D] is what the projector gave; where it holds some of the image's patches
    only, ``patches`` [V] says which.
    """
    decoder = model.model.language_model
    total = model.config.image_seq_length
    patches = torch.arange(total) if patches is None else patches
    tokens = _text_tokens(decoder, text, total)
    for index, layer in enumerate(decoder.layers):
        if index == schedule.inject:
            tokens = _inject(tokens, vision, patches)
        if index in schedule.prune:
            tokens = _prune(decoder, index, tokens, text, schedule.prune[index])
        if index == schedule.exit:
            tokens = _drop(tokens)
        tokens = replace(tokens, hidden=_layer(decoder, layer, tokens))
    states = decoder.norm(tokens.hidden[:, tokens.start + tokens.vision :])
    return states.reshape(len(text.questions), -1, states.shape[-1])


def _packed(tokens: PackedTokens, text: PackedText) -> bool:
    return tokens.hidden.shape[0] == text.questions.shape[0] and bool(text.questions.shape[1] > 1)


def _text_tokens(decoder: Any, text: PackedText, vision: int) -> PackedTokens:
    """Embed the text alone, with a gap in the positions where the image belongs."""
    batch, count, length = text.questions.shape
    start, more = len(text.prefix), int(text.whole.shape[1])
    prefix = text.prefix.expand(batch, -1)
    ids = torch.cat([prefix, text.questions.flatten(1), text.whole], dim=1)
    after = torch.cat([torch.arange(length).repeat(count), torch.arange(more)])
    positions = torch.cat([torch.arange(start), after + start + vision])[None]
    question = torch.arange(count).repeat_interleave(length)
    owners = torch.cat(
        [torch.full((start,), SHARED), question, torch.full((more,), count, dtype=torch.long)]
    )
    return PackedTokens(decoder.embed_tokens(ids), positions, owners, start, 0)


def _layer(decoder: Any, layer: nn.Module, tokens: PackedTokens) -> torch.Tensor:
    rotation = decoder.rotary_emb(tokens.hidden, position_ids=tokens.positions)
    plain = bool((tokens.owners <= 0).all())
    mask = None if plain else tokens.allowed[:, None]
    states: torch.Tensor = layer(
        tokens.hidden,
        attention_mask=mask,
        position_ids=tokens.positions,
        position_embeddings=rotation,
    )
    return states


def _inject(tokens: PackedTokens, vision: torch.Tensor, patches: torch.Tensor) -> PackedTokens:
    count, start = int(vision.shape[1]), tokens.start
    places = (patches + start)[None].expand(tokens.positions.shape[0], -1)
    return PackedTokens(
        torch.cat([tokens.hidden[:, :start], vision, tokens.hidden[:, start:]], dim=1),
        torch.cat([tokens.positions[:, :start], places, tokens.positions[:, start:]], dim=1),
        torch.cat([tokens.owners[:start], torch.full((count,), SHARED), tokens.owners[start:]]),
        start,
        count,
    )


def _drop(tokens: PackedTokens) -> PackedTokens:
    end = tokens.start + tokens.vision

    def cut(columns: torch.Tensor, axis: int) -> torch.Tensor:
        length = columns.shape[axis]
        kept = (columns.narrow(axis, 0, tokens.start), columns.narrow(axis, end, length - end))
        return torch.cat(kept, dim=axis)

    hidden, positions = cut(tokens.hidden, 1), cut(tokens.positions, 1)
    return PackedTokens(hidden, positions, cut(tokens.owners, 0), tokens.start, 0)


def _prune(
    decoder: Any, index: int, tokens: PackedTokens, text: PackedText, count: int
) -> PackedTokens:
    """Keep the ``count`` vision tokens that each question's last prompt token looks at most."""
    if _packed(tokens, text):
        tokens, rows = _separate(tokens, text), text.asked.flatten()
    else:
        rows = text.asked.flatten()
    scores = vision_scores(decoder, index, tokens, rows + tokens.start + tokens.vision)
    kept = scores.topk(min(count, tokens.vision), dim=1).indices.sort(dim=1).values
    start, end = tokens.start, tokens.start + tokens.vision
    wide = kept[:, :, None].expand(-1, -1, tokens.hidden.shape[2])
    states = tokens.hidden[:, start:end].gather(1, wide)
    positions = tokens.positions.expand(len(kept), -1)
    places = positions[:, start:end].gather(1, kept)
    return PackedTokens(
        torch.cat([tokens.hidden[:, :start], states, tokens.hidden[:, end:]], dim=1),
        torch.cat([positions[:, :start], places, positions[:, end:]], dim=1),
        torch.cat([tokens.owners[: start + kept.shape[1]], tokens.owners[end:]]),
        start,
        int(kept.shape[1]),
    )


def _separate(tokens: PackedTokens, text: PackedText) -> PackedTokens:
    """Unpack into one sequence a question, [B * S, P + V + T]."""
    count, length = text.questions.shape[1:]
    shared = tokens.start + tokens.vision
    common = tokens.hidden[:, None, :shared].expand(-1, count, -1, -1)
    own = tokens.hidden[:, shared:].unflatten(1, (count, length))
    hidden = torch.cat([common, own], dim=2).flatten(0, 1)
    columns = shared + length
    owners = torch.cat([tokens.owners[:shared], torch.zeros(length, dtype=torch.long)])
    return PackedTokens(hidden, tokens.positions[:, :columns], owners, tokens.start, tokens.vision)


@torch.no_grad()
def vision_scores(
    decoder: Any, index: int, tokens: PackedTokens, rows: torch.Tensor
) -> torch.Tensor:
    """Return the attention of row ``rows[n]`` to each vision token in layer ``index``, [N, V] fp32.

    ``tokens`` holds one question a sequence; the mean is taken over the heads.
    """
    layer = decoder.layers[index]
    attention = layer.self_attn
    normal = layer.input_layernorm(tokens.hidden)
    row = torch.arange(len(rows))
    query = attention.q_proj(normal[row, rows]).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(normal).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    cos, sin = decoder.rotary_emb(tokens.hidden, position_ids=tokens.positions)
    cos, sin = (angle.expand(len(rows), -1, -1) for angle in (cos, sin))
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    at_row = cos[row, rows][:, None], sin[row, rows][:, None]
    query, _ = apply_rotary_pos_emb(query[:, :, None], query[:, :, None], *at_row)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ key.transpose(2, 3)).squeeze(2).float() * attention.scaling
    seen = torch.arange(logits.shape[-1])[None] <= rows[:, None]
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).mean(1)
    return weights[:, tokens.start : tokens.start + tokens.vision]
