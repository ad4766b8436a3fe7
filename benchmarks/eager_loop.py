"""The schedule as one would write it by hand: a plain loop over a model's layers, no compiler.

One row, no padding, no cache: what a paper's code does, on the unmodified modules of transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hidrop_fx import Schedule


@torch.no_grad()
def prefill(model: Any, schedule: Schedule, inputs: dict[str, Any]) -> Tensor:
    """Logits of the last position."""
    decoder = model.get_decoder()
    ids = inputs["input_ids"][0]
    is_image = ids == model.config.image_token_id
    features = torch.cat(inputs["mm_encoder_outputs"]["image"].pooler_output)
    columns = (~is_image).nonzero().flatten()
    hidden = decoder.embed_tokens(ids[columns])[None]
    for index, layer in enumerate(decoder.layers):
        if index == schedule.inject:
            places = is_image.nonzero().flatten()
            columns, order = torch.cat([columns, places]).sort()
            hidden = torch.cat([hidden, features[None]], dim=1)[:, order]
        if index in schedule.prune:
            scores = _scores(decoder, layer, hidden, columns)
            candidates = is_image[columns].nonzero().flatten()
            best = scores[candidates].topk(min(int(schedule.prune[index]), len(candidates))).indices
            chosen = (~is_image)[columns]
            chosen[candidates[best]] = True
            columns, hidden = columns[chosen], hidden[:, chosen]
        if index == schedule.exit:
            chosen = (~is_image)[columns]
            columns, hidden = columns[chosen], hidden[:, chosen]
        rope = decoder.rotary_emb(hidden, columns[None])
        hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
    return model.lm_head(decoder.norm(hidden[:, -1:]))


def _scores(decoder: Any, layer: Any, hidden: Tensor, columns: Tensor) -> Tensor:
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(states[:, -1:]).view(1, 1, -1, attention.head_dim).transpose(1, 2)
    key = attention.k_proj(states).view(shape).transpose(1, 2)
    cos, sin = decoder.rotary_emb(hidden, columns[None])
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
    logits = query.float() @ key.float().transpose(2, 3) * attention.scaling
    return logits.softmax(dim=-1).mean(dim=1)[0, 0]
