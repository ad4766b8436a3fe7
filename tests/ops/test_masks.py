"""Masks by rule: the columns and blocks of the tokens that are there, against the rule a token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hidrop_fx.ops.masks import MaskRule, chunks_of, reading_mask, rule_mask, run_blocks

L = 9
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, -1, -1, -1, -1, -1]])
COLUMNS = torch.tensor([[0, 1, 3, 5, 6, 8, L], [2, 3, 4, 6, L, L, L]])
"""Tokens that are left, and the sentinel."""


def sees(blocks: list[int], query: int, key: int, window: int | None, rule: str | None) -> bool:
    in_window = window is None or query - key < window
    same = rule is not None and blocks[query] >= 0 and blocks[query] == blocks[key]
    if rule == "beyond" and same:
        return True
    return (key <= query or same) and in_window


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("rule", [None, "within", "beyond"])
def test_a_mask_follows_the_tokens_that_are_there(window: int | None, rule: str | None) -> None:
    blocks = BLOCKS if rule else None
    mask = rule_mask(COLUMNS, blocks, window, rule == "beyond")
    assert mask.shape == (2, 1, 7, 7)
    assert mask.dtype == torch.bool
    for b, columns in enumerate(COLUMNS.tolist()):
        for i, query in enumerate(columns):
            assert mask[b, 0, i, i]
            for j, key in enumerate(columns):
                if query < L:
                    wanted = sees(BLOCKS[b].tolist(), query, key, window, rule)
                    assert mask[b, 0, i, j] == wanted, (query, key)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_tokens_see_the_chunk_of_their_row_alone(size: int) -> None:
    """Chunks begin at a row's first token, as transformers counts them; what is taken out leaves them as they are."""
    first = [0, 2]
    chunks = chunks_of(torch.tensor(first), L, size)
    mask = rule_mask(COLUMNS, None, None, chunks=chunks)
    read = reading_mask(COLUMNS[:, 2:5], COLUMNS, None, chunks)
    for b, columns in enumerate(COLUMNS.tolist()):
        for i, query in enumerate(columns):
            for j, key in enumerate(columns):
                same = (query - first[b]) // size == (key - first[b]) // size
                if query < L:
                    assert mask[b, 0, i, j] == (key <= query and same)
        assert torch.equal(read[b, 0], mask[b, 0, 2:5]) or L in columns[2:5]


def test_absent_tokens_are_seen_by_none_of_those_that_are_there() -> None:
    for rule in ("within", "beyond"):
        mask = rule_mask(COLUMNS, BLOCKS, None, rule == "beyond")
        absent = COLUMNS == L
        assert not (mask[:, 0] & absent[:, None, :] & ~absent[:, :, None]).any()


def runs(values: list[int]) -> list[int]:
    given: Tensor = torch.tensor([values]).bool()
    return run_blocks(given)[0].tolist()


def test_runs_are_numbered_from_the_left() -> None:
    assert runs([0, 1, 1, 0, 1, 0, 0, 1]) == [-1, 0, 0, -1, 1, -1, -1, 2]
    assert runs([1, 1, 1]) == [0, 0, 0]
    assert runs([0, 0]) == [-1, -1]


def test_a_rule_asks_for_a_mask_only_where_it_is_not_plain_causal() -> None:
    both = MaskRule(window=8, blocks="within")
    assert both.for_call(8, blocks=False) is None
    assert both.for_call(9, blocks=False) == MaskRule(window=8)
    assert both.for_call(4, blocks=True) is both
    assert MaskRule(chunk=8).for_call(9, blocks=False) == MaskRule(chunk=8)
    assert MaskRule(chunk=8).for_call(8, blocks=False) is None
    assert MaskRule(chunk=8).for_call(8, blocks=False, floors=True) == MaskRule(floors=True)
    assert MaskRule().for_call(10**6, blocks=True) is None
    assert MaskRule(window=8).for_call(9, blocks=True) == MaskRule(window=8)
