"""Token operations: the glue that passes insert between decoder layers.

A segment is its hidden states [B, S, D] and its `columns` [B, S] int64: the column of the prompt each
token came from, ascending, so that invalid tokens, whose column is the sentinel L (one past the
last), come last. Everything else about a token is looked up by its column, in tables whose last
place belongs to the sentinel: position ids, `is_vision` and blocks [B, L + 1].
`slots` is `arange(T)`: it carries the length of the next segment into a graph without a number.

All functions are plain tensor code, and can be traced and compiled.
"""

import torch
from torch import Tensor


def take_tokens(states: Tensor, index: Tensor) -> Tensor:
    """Gather rows of `states` [B, S, D] at `index` [B, T] -> [B, T, D]; [B, S, D, E] likewise."""
    if states.dim() == 4:
        return take_tokens(states.flatten(2), index).unflatten(2, states.shape[2:])
    batch, tokens, width = states.shape
    rows = torch.arange(batch, device=index.device) * tokens
    return take_rows(states.reshape(batch * tokens, width), index + rows[:, None])


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows of a table [N, D] at `index` [B, T] -> [B, T, D]."""
    # Copies whole rows, where gather would go value by value; in backward it adds whole rows, where that of
    # table[index] sorts the index first on CUDA.
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])


def add_columns(states: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """Add to the tokens `states` [B, S, D] of `columns` [B, S] their rows of a table [B, L + 1, D]."""
    return states + take_tokens(table, columns).to(states.dtype)


def add_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Add `rows` to `states`, both [B, S, D]."""
    return states + rows.to(states.dtype)


def take_keys(keys: Tensor, index: Tensor) -> Tensor:
    """Gather tokens of `keys` [B, G, S, d] at `index` [B, T] -> [B, G, T, d]."""
    # Token by token is how projections leave them, and how attention's own keys lie.
    taken = take_tokens(keys.transpose(1, 2).flatten(2), index)
    return taken.unflatten(2, keys.shape[1::2]).transpose(1, 2)


def lookup(table: Tensor, columns: Tensor) -> Tensor:
    """Look `columns` [B, S] up in a per-column `table` [B, L + 1] -> [B, S]."""
    return table.gather(1, columns)


def find_columns(columns: Tensor, wanted: Tensor) -> Tensor:
    """Find the places [B, T] of the columns `wanted` [B, T] in a segment; some place for an absent one."""
    return torch.searchsorted(columns, wanted).clamp(max=columns.shape[1] - 1)


def merge_index(text_columns: Tensor, vision_columns: Tensor, slots: Tensor) -> Tensor:
    """Compute the places [B, S] in text [B, T] followed by vision [B, V] that put both in prompt order."""
    columns = torch.cat([text_columns, vision_columns], dim=1)
    return columns.argsort(dim=1, stable=True).gather(1, _rows(slots, columns))


def merge_tokens(text: Tensor, vision: Tensor, index: Tensor) -> Tensor:
    """Merge text [B, T, D] and vision [B, V, D] into one segment [B, S, D]."""
    batch, slots = index.shape
    given, dtype = text.shape[1], torch.promote_types(text.dtype, vision.dtype)
    # Every token is copied once, to its place; those that have none share the row past the end.
    end = batch * slots
    places = index.new_full((batch, given + vision.shape[1]), end)
    places = places.scatter(1, index, torch.arange(end, device=index.device).view(batch, slots))
    merged = torch.empty(end + 1, text.shape[2], dtype=dtype, device=text.device)
    merged[places[:, :given]] = text.to(dtype)
    merged[places[:, given:]] = vision.to(dtype)
    return merged[:end].view(batch, slots, -1)


def merge_columns(text_columns: Tensor, vision_columns: Tensor, index: Tensor) -> Tensor:
    """Merge the columns of both into those [B, S] of the merged segment."""
    return torch.cat([text_columns, vision_columns], dim=1).gather(1, index)


def system_tokens(columns: Tensor, is_vision: Tensor) -> Tensor:
    """Return which tokens [B, T] stand before a row's first vision token; none in a row without one.

    `is_vision` is the table [B, L + 1].
    """
    first = is_vision.int().argmax(dim=1, keepdim=True)
    return is_vision.any(dim=1, keepdim=True) & (columns < first)


def hold(attended: Tensor, held: Tensor) -> Tensor:
    """Zero what attention [B, H, T, d] gives to the tokens `held` [B, T]."""
    return attended.masked_fill(held[:, None, :, None], 0)


def renumber(columns: Tensor) -> Tensor:
    """Number the tokens of a segment 0, 1, 2, ... [B, S]: valid tokens come first, so the place is the number."""
    places = torch.arange(columns.shape[1], device=columns.device)
    return _rows(places, columns)


def renumber_text(position_ids: Tensor, is_vision: Tensor) -> Tensor:
    """Compute position ids [B, L + 1] that number text as if there were no vision tokens before it."""
    before = is_vision.to(position_ids.dtype).cumsum(dim=1)
    return torch.where(is_vision, position_ids, position_ids - before)


def fold_copies(position_ids: Tensor) -> Tensor:
    """Put the K position ids of each token [K, axes, B, S] into the batch: [axes, K B, S]."""
    return position_ids.transpose(0, 1).flatten(1, 2)


def by_parts(table: Tensor, parts: Tensor, copies: int) -> Tensor:
    """Take each dimension of cos or sin [K B, S, d], made from K position ids a token, from the id of its part: [B, S, d]."""
    table = table.unflatten(0, (copies, -1))
    index = parts.expand(1, *table.shape[1:])
    return table.gather(0, index)[0]


def detached(scores: Tensor) -> Tensor:
    """Cut scores off from their gradient: a selection needs none, and a backward of zeros is not free."""
    return scores.detach()


def ranks(scores: Tensor) -> Tensor:
    """Rank `scores` [B, S] within their row, 0 for the highest; the lower place wins a tie."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    # In 32 bit, for which Inductor has a scatter of its own on a GPU; every place of a row is written once.
    places = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    return torch.zeros_like(order, dtype=torch.int32).scatter(1, order, _rows(places, order)).long()


def surviving_columns(
    scores: Tensor, columns: Tensor, is_vision: Tensor, keep: Tensor, slots: Tensor
) -> Tensor:
    """Select the columns [B, T] of the tokens that outlive a prune, in prompt order, sentinels last.

    Text stays. Of a row's vision tokens the `keep` [B] highest scores stay: exactly so many, the
    lower column winning a tie. `is_vision` is the table [B, L + 1].
    """
    candidates = lookup(is_vision, columns)
    ranked = torch.where(candidates, scores, float("-inf"))
    dropped = candidates & (ranks(ranked) >= keep[:, None])
    return _without(dropped, columns, is_vision, slots)


def chosen_columns(
    scores: Tensor, columns: Tensor, is_vision: Tensor, keep: Tensor, slots: Tensor
) -> Tensor:
    """Select columns as `surviving_columns` does, of vision tokens those alone whose score is not -inf."""
    candidates = lookup(is_vision, columns)
    ranked = torch.where(candidates, scores, float("-inf"))
    dropped = candidates & ((ranks(ranked) >= keep[:, None]) | ranked.isneginf())
    return _without(dropped, columns, is_vision, slots)


def survival_mask(
    scores: Tensor, columns: Tensor, is_vision: Tensor, ratio: Tensor, soft: bool
) -> Tensor:
    """Compute how surely each token outlives a prune, fp32 [B, S] in (0, 1]; text for sure.

    HiDrop's differentiable top-k: c'_i = mean_j 1(c_i >= c_j), mask = sigmoid((c' - a) * N), over the
    N vision tokens of a row. `ratio` a is the share that is dropped, a scalar. `soft` ranks replace
    the step by a sigmoid in units of a tenth of the scores' spread, so that scores get gradients.
    """
    candidates = lookup(is_vision, columns)
    count = candidates.sum(dim=1, keepdim=True).clamp(min=1)
    if soft:
        normalised = _soft_ranks(scores, candidates, count)
    else:
        ranked = torch.where(candidates, scores, float("-inf"))
        normalised = (count - ranks(ranked)).float() / count
    mask = torch.sigmoid((normalised - ratio.float()) * count)
    return torch.where(candidates, mask, 1.0)


def _soft_ranks(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    with torch.no_grad():
        mean = (scores * candidates).sum(dim=1, keepdim=True) / count
        spread = ((scores - mean).square() * candidates).sum(dim=1, keepdim=True) / count
        unit = 0.1 * spread.sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
    steps = torch.sigmoid((scores[:, :, None] - scores[:, None, :]) / unit[:, :, None])
    return (steps * candidates[:, None, :]).sum(dim=2) / count


def survival_gate(mask: Tensor, index: Tensor) -> Tensor:
    """Return exact ones, fp32 [B, T], with the gradient of mask[index]; mask is [B, S]."""
    chosen = mask.gather(1, index)
    return 1.0 + (chosen - chosen.detach())


def gate_states(states: Tensor, gate: Tensor) -> Tensor:
    """Multiply hidden states [B, T, D] by a gate [B, T]."""
    return states * gate[:, :, None].to(states.dtype)


def gate_values(values: Tensor, gate: Tensor) -> Tensor:
    """Multiply attention values [B, G, T, d] by a gate [B, T]."""
    return values * gate[:, None, :, None].to(values.dtype)


def text_columns(columns: Tensor, is_vision: Tensor, slots: Tensor) -> Tensor:
    """Select the columns [B, T] of the tokens that stay when every vision token leaves."""
    return _without(lookup(is_vision, columns), columns, is_vision, slots)


def _without(dropped: Tensor, columns: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    sentinel = table.shape[1] - 1
    kept = torch.where(dropped, sentinel, columns).sort(dim=1).values
    return kept.gather(1, _rows(slots, columns))


def _rows(places: Tensor, like: Tensor) -> Tensor:
    return places[None].expand(like.shape[0], -1)
