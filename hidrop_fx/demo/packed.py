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
class Plan:
    """Vision tokens join at ``inject``, shrink at the layers of ``prune`` and leave at ``exit``."""

    inject: int = 0
    prune: Mapping[int, int] = field(default_factory=dict)
    exit: int = 10**9


IDENTITY = Plan()


@dataclass(frozen=True)
class Text:
    """Token ids around the image: ``prefix`` [P] and ``questions`` [B, S, T], padded at the end.

    ``asked`` [B, S] is the index in T of each last prompt token. ``whole`` [B, W] is one longer
    question more, for plans that do not prune; W may be 0.
    """

    prefix: torch.Tensor
    questions: torch.Tensor
    asked: torch.Tensor
    whole: torch.Tensor


@dataclass(frozen=True)
class Stream:
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
        """Which column each row may see, [N or 1, L, L]."""
        earlier = self.positions[:, None, :] <= self.positions[:, :, None]
        shared = self.owners == SHARED
        return earlier & (shared[None, :] | (self.owners[None, :] == self.owners[:, None]))


def run_decoder(
    model: LlavaForConditionalGeneration,
    text: Text,
    vision: torch.Tensor,
    plan: Plan,
    patches: torch.Tensor | None = None,
) -> torch.Tensor:
    """The normed last states of the question tokens and of ``whole``, [B, S * T + W, D].

    ``vision`` [B, V, D] is what the projector gave; where it holds some of the image's patches
    only, ``patches`` [V] says which.
    """
    decoder = model.model.language_model
    total = model.config.image_seq_length
    patches = torch.arange(total) if patches is None else patches
    stream = _text_stream(decoder, text, total)
    for index, layer in enumerate(decoder.layers):
        if index == plan.inject:
            stream = _inject(stream, vision, patches)
        if index in plan.prune:
            stream = _prune(decoder, index, stream, text, plan.prune[index])
        if index == plan.exit:
            stream = _drop(stream)
        stream = replace(stream, hidden=_layer(decoder, layer, stream))
    states = decoder.norm(stream.hidden[:, stream.start + stream.vision :])
    return states.reshape(len(text.questions), -1, states.shape[-1])


def _packed(stream: Stream, text: Text) -> bool:
    return stream.hidden.shape[0] == text.questions.shape[0] and bool(text.questions.shape[1] > 1)


def _text_stream(decoder: Any, text: Text, vision: int) -> Stream:
    """Text alone, with a gap in the positions where the image belongs."""
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
    return Stream(decoder.embed_tokens(ids), positions, owners, start, 0)


def _layer(decoder: Any, layer: nn.Module, stream: Stream) -> torch.Tensor:
    rotation = decoder.rotary_emb(stream.hidden, position_ids=stream.positions)
    plain = bool((stream.owners <= 0).all())
    mask = None if plain else stream.allowed[:, None]
    states: torch.Tensor = layer(
        stream.hidden,
        attention_mask=mask,
        position_ids=stream.positions,
        position_embeddings=rotation,
    )
    return states


def _inject(stream: Stream, vision: torch.Tensor, patches: torch.Tensor) -> Stream:
    count, start = int(vision.shape[1]), stream.start
    places = (patches + start)[None].expand(stream.positions.shape[0], -1)
    return Stream(
        torch.cat([stream.hidden[:, :start], vision, stream.hidden[:, start:]], dim=1),
        torch.cat([stream.positions[:, :start], places, stream.positions[:, start:]], dim=1),
        torch.cat([stream.owners[:start], torch.full((count,), SHARED), stream.owners[start:]]),
        start,
        count,
    )


def _drop(stream: Stream) -> Stream:
    end = stream.start + stream.vision

    def cut(columns: torch.Tensor, axis: int) -> torch.Tensor:
        length = columns.shape[axis]
        kept = (columns.narrow(axis, 0, stream.start), columns.narrow(axis, end, length - end))
        return torch.cat(kept, dim=axis)

    hidden, positions = cut(stream.hidden, 1), cut(stream.positions, 1)
    return Stream(hidden, positions, cut(stream.owners, 0), stream.start, 0)


def _prune(decoder: Any, index: int, stream: Stream, text: Text, count: int) -> Stream:
    """Keep the ``count`` vision tokens that each question's last prompt token looks at most."""
    if _packed(stream, text):
        stream, rows = _separate(stream, text), text.asked.flatten()
    else:
        rows = text.asked.flatten()
    scores = vision_scores(decoder, index, stream, rows + stream.start + stream.vision)
    kept = scores.topk(min(count, stream.vision), dim=1).indices.sort(dim=1).values
    start, end = stream.start, stream.start + stream.vision
    wide = kept[:, :, None].expand(-1, -1, stream.hidden.shape[2])
    states = stream.hidden[:, start:end].gather(1, wide)
    positions = stream.positions.expand(len(kept), -1)
    places = positions[:, start:end].gather(1, kept)
    return Stream(
        torch.cat([stream.hidden[:, :start], states, stream.hidden[:, end:]], dim=1),
        torch.cat([positions[:, :start], places, positions[:, end:]], dim=1),
        torch.cat([stream.owners[: start + kept.shape[1]], stream.owners[end:]]),
        start,
        int(kept.shape[1]),
    )


def _separate(stream: Stream, text: Text) -> Stream:
    """One sequence a question, [B * S, P + V + T]."""
    count, length = text.questions.shape[1:]
    shared = stream.start + stream.vision
    common = stream.hidden[:, None, :shared].expand(-1, count, -1, -1)
    own = stream.hidden[:, shared:].unflatten(1, (count, length))
    hidden = torch.cat([common, own], dim=2).flatten(0, 1)
    columns = shared + length
    owners = torch.cat([stream.owners[:shared], torch.zeros(length, dtype=torch.long)])
    return Stream(hidden, stream.positions[:, :columns], owners, stream.start, stream.vision)


@torch.no_grad()
def vision_scores(decoder: Any, index: int, stream: Stream, rows: torch.Tensor) -> torch.Tensor:
    """Attention that row ``rows[n]`` pays each vision token in layer ``index``, [N, V] fp32.

    ``stream`` holds one question a sequence; the mean is taken over the heads.
    """
    layer = decoder.layers[index]
    attention = layer.self_attn
    normal = layer.input_layernorm(stream.hidden)
    row = torch.arange(len(rows))
    query = attention.q_proj(normal[row, rows]).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(normal).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    cos, sin = decoder.rotary_emb(stream.hidden, position_ids=stream.positions)
    cos, sin = (angle.expand(len(rows), -1, -1) for angle in (cos, sin))
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    at_row = cos[row, rows][:, None], sin[row, rows][:, None]
    query, _ = apply_rotary_pos_emb(query[:, :, None], query[:, :, None], *at_row)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ key.transpose(2, 3)).squeeze(2).float() * attention.scaling
    seen = torch.arange(logits.shape[-1])[None] <= rows[:, None]
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).mean(1)
    return weights[:, stream.start : stream.start + stream.vision]
