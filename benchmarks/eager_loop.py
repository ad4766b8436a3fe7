"""The schedule as one would write it by hand: a plain loop over a model's layers, no compiler.

No padding, no cache, image and answer at the same place in every row: what a paper's code does, on the
unmodified modules of transformers. It follows HiDrop's own schedules: late injection, counts at prunes, exit.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hidrop_fx import Schedule


def follows(schedule: Schedule) -> bool:
    """Return True for a schedule of which the loop does all that it says; it would leave the rest out."""
    counts = {k: keep for k, keep in schedule.prune.items() if type(keep) is int}
    return schedule == Schedule(inject=schedule.inject, prune=counts, exit=schedule.exit)


@torch.no_grad()
def prefill(model: Any, schedule: Schedule, inputs: dict[str, Any]) -> Tensor:
    """Return the logits of the last position."""
    hidden, _ = _run(model, schedule, inputs, query=inputs["input_ids"].shape[1] - 1)
    logits: Tensor = model.lm_head(hidden[:, -1:])
    return logits


def loss(model: Any, schedule: Schedule, inputs: dict[str, Any]) -> Tensor:
    """Return HF's loss of the text; each row's one answer is the end of it."""
    labels = inputs["labels"]
    answer = int((labels[0] != -100).nonzero()[0])
    hidden, columns = _run(model, schedule, inputs, query=answer - 1)
    is_text = inputs["input_ids"] != model.config.image_token_id
    hidden, columns = _keep(hidden, columns, is_text.gather(1, columns))
    logits = model.lm_head(hidden)
    loss: Tensor = model.loss_function(logits, labels.gather(1, columns), logits.shape[-1])
    return loss


def _run(
    model: Any, schedule: Schedule, inputs: dict[str, Any], query: int
) -> tuple[Tensor, Tensor]:
    """Return hidden states [B, S, D] and their columns [B, S]; the column `query` scores."""
    if not follows(schedule):
        raise ValueError(f"the hand-written loop follows no schedule like {schedule}")
    decoder = model.get_decoder()
    ids = inputs["input_ids"]
    is_image = ids == model.config.image_token_id
    features = torch.stack(list(inputs["mm_encoder_outputs"]["image"].pooler_output))
    everything = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    columns = everything[~is_image].view(len(ids), -1)
    hidden = decoder.embed_tokens(ids.gather(1, columns))
    for index, layer in enumerate(decoder.layers):
        if index == schedule.inject:
            places = everything[is_image].view(len(ids), -1)
            columns, order = torch.cat([columns, places], dim=1).sort(dim=1)
            hidden = _take(torch.cat([hidden, features], dim=1), order)
        if index in schedule.prune:
            image = is_image.gather(1, columns)
            scores = _scores(decoder, layer, hidden, columns, query).masked_fill(~image, -1.0)
            count = min(int(schedule.prune[index]), int(image[0].sum()))
            best = scores.topk(count, dim=1).indices
            hidden, columns = _keep(hidden, columns, (~image).scatter(1, best, True))
        if index == schedule.exit:
            hidden, columns = _keep(hidden, columns, ~is_image.gather(1, columns))
        rope = decoder.rotary_emb(hidden, columns)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
    return decoder.norm(hidden), columns


def _keep(hidden: Tensor, columns: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Select equally many columns in every row."""
    index = chosen.nonzero()[:, 1].view(len(chosen), -1)
    return _take(hidden, index), columns.gather(1, index)


def _take(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2]))


@torch.no_grad()
def _scores(decoder: Any, layer: Any, hidden: Tensor, columns: Tensor, query: int) -> Tensor:
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:2], -1, attention.head_dim)
    cos, sin = decoder.rotary_emb(hidden, columns)
    key = attention.k_proj(states).view(shape).transpose(1, 2)
    queries = attention.q_proj(states).view(shape).transpose(1, 2)
    queries, key = apply_rotary_pos_emb(queries, key, cos, sin)
    place = (columns == query).nonzero()[:, 1]
    row = queries[torch.arange(len(place)), :, place][:, :, None]
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = row.float() @ key.float().transpose(2, 3) * attention.scaling
    visible = (columns <= query)[:, None, None]
    return logits.masked_fill(~visible, float("-inf")).softmax(dim=-1).mean(dim=1)[:, 0]
