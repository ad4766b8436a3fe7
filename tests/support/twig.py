"""TwigVLM's rule for one row, written out from its released code, with no line of the product in it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-b, a], dim=-1) * sin


def normed(norm: Any, states: Tensor) -> Tensor:
    return (
        states
        * (states.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        * norm.weight
    )


def layer_of(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Any:
    """Return hidden states [n, D] and attention [heads, n, n] of one Llama layer on one row's tokens."""
    attention, states = layer.self_attn, normed(layer.input_layernorm, hidden)
    width = attention.head_dim
    query, key, value = (
        nn.functional.linear(states, p.weight, p.bias).unflatten(-1, (-1, width)).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    logits = (query @ key.transpose(1, 2) / math.sqrt(width)).masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1)
    hidden = hidden + (weights @ value).transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
    states, mlp = normed(layer.post_attention_layernorm, hidden), layer.mlp
    gated = nn.functional.silu(states @ mlp.gate_proj.weight.T) * (states @ mlp.up_proj.weight.T)
    return hidden + gated @ mlp.down_proj.weight.T, weights


class TwigVLM:
    """The rule for one row without pads: chooses once, on the prompt, and goes on with what stayed."""

    def __init__(self, model: Any, twig: Any, *, layer: int, average: int, exit: int) -> None:
        self.model, self.twig = model, twig
        self.layer, self.average, self.exit = layer, average, exit
        self.stays: Tensor | None = None
        self.counts: list[int] = []

    def __call__(self, ids: Tensor, features: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of the tokens that there are behind the exit."""
        decoder = self.model.model.language_model
        is_vision = ids.eq(self.model.config.image_token_id)
        hidden = decoder.embed_tokens(ids)
        hidden = hidden.masked_scatter(is_vision[:, None], features)
        columns = torch.arange(len(ids))
        self.counts = []
        for index, layer in enumerate(decoder.layers):
            if index == self.layer:
                if self.stays is None:
                    self.stays = self._chosen(hidden, columns, is_vision)
                kept = torch.cat([self.stays, torch.ones(len(ids) - len(self.stays)).bool()])
                hidden, columns = hidden[kept], columns[kept]
            if index == self.exit:
                text = ~is_vision[columns]
                hidden, columns = hidden[text], columns[text]
            self.counts.append(len(columns))
            hidden, _ = layer_of(layer, hidden, *self._angles(hidden, columns), _causal(columns))
        return nn.functional.linear(normed(decoder.norm, hidden), self.model.lm_head.weight)

    def _angles(self, hidden: Tensor, columns: Tensor) -> Any:
        rope = self.model.model.language_model.rotary_emb
        return (table[0] for table in rope(hidden[None], columns[None]))

    def _chosen(self, hidden: Tensor, columns: Tensor, is_vision: Tensor) -> Tensor:
        count, layers = int(is_vision.sum()), len(self.model.model.language_model.layers)
        if not count:
            return torch.ones(len(columns)).bool()
        left = (layers * self.average - self.layer * count) / (self.exit - self.layer)
        cos, sin = self._angles(hidden, columns)
        for layer in self.twig:
            hidden, attention = layer_of(layer, hidden, cos, sin, _causal(columns))
        scores = attention.mean(0)[-1].masked_fill(~is_vision, -1)
        best = scores.topk(math.ceil(left)).indices
        return ~is_vision | torch.zeros(len(columns)).scatter(0, best, 1.0).bool()


def _causal(columns: Tensor) -> Tensor:
    return columns[None] <= columns[:, None]


def rows_of(model: Any, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return ids and features of every row, pads stripped."""
    images = iter(model.get_image_features(inputs["pixel_values"]).pooler_output)
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        own = ids[mask.bool()]
        there = bool(own.eq(model.config.image_token_id).any())
        features = next(images) if there else model.lm_head.weight.new_zeros(0, 32)
        found.append((own, features))
    return found


def a_twig(model: Any, layers: int = 3) -> nn.ModuleList:
    """Make a branch of the model's layers with weights of its own."""
    own = model.model.language_model.layers
    twig = nn.ModuleList(copy.deepcopy(own[k]) for k in range(1, 1 + layers))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in twig.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return twig


def shallow_loss(model: Any, twig: Any, layer: int, rows: Any, labels: Any) -> Tensor:
    """Compute the next-token loss of a branch behind the first `layer` layers, through the model's own norm and head.

    Args:
        rows: ids and features of each row without pads. labels: of each such row.
    """
    decoder, total, count = model.model.language_model, torch.zeros(()), 0
    for (ids, features), wanted in zip(rows, labels, strict=True):
        is_vision = ids.eq(model.config.image_token_id)
        hidden = decoder.embed_tokens(ids).masked_scatter(is_vision[:, None], features)
        columns = torch.arange(len(ids))
        cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], columns[None]))
        for each in [*decoder.layers[:layer], *twig]:
            hidden, _ = layer_of(each, hidden, cos, sin, _causal(columns))
        logits = normed(decoder.norm, hidden) @ model.lm_head.weight.T
        total = total + nn.functional.cross_entropy(
            logits[:-1], wanted[1:], ignore_index=-100, reduction="sum"
        )
        count += int((wanted[1:] != -100).sum())
    return total / count
