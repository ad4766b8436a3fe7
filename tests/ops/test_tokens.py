"""Every operation on token segments, against a plain Python loop over rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention_scores import attention_scores

L = 8
"""Columns of the prompts below, hence also the sentinel."""


def table_of(rows: list[list[int]]) -> Tensor:
    """`is_vision` [B, L + 1] with the given columns true."""
    table = torch.zeros(len(rows), L + 1, dtype=torch.bool)
    for b, columns in enumerate(rows):
        table[b, columns] = True
    return table


def packed(rows: list[list[int]], width: int | None = None) -> Tensor:
    """Columns [B, S], short rows filled with the sentinel."""
    width = width or max(map(len, rows))
    return torch.tensor([row + [L] * (width - len(row)) for row in rows])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Gathers and look-ups.


def test_take_tokens_takes_rows_in_the_order_asked_for_and_twice_if_asked() -> None:
    states, index = random(2, 4, 3), torch.tensor([[3, 0, 0], [1, 2, 1]])
    taken = tokens.take_tokens(states, index)
    expected = [[states[b, i] for i in index[b].tolist()] for b in range(2)]
    assert torch.equal(taken, torch.stack([torch.stack(row) for row in expected]))


def test_take_tokens_of_none_is_empty() -> None:
    assert tokens.take_tokens(random(2, 4, 3), torch.zeros(2, 0, dtype=torch.long)).shape == (
        2,
        0,
        3,
    )


def test_take_tokens_sends_gradients_to_the_rows_taken_only() -> None:
    states = random(1, 4, 2).requires_grad_()
    tokens.take_tokens(states, torch.tensor([[2, 0, 2]])).sum().backward()
    assert states.grad is not None
    assert states.grad[0, :, 0].tolist() == [1, 0, 2, 0]


def test_take_keys_takes_the_same_tokens_of_every_head() -> None:
    keys, index = random(2, 3, 5, 4), torch.tensor([[4, 1], [0, 0]])
    taken = tokens.take_keys(keys, index)
    assert taken.shape == (2, 3, 2, 4)
    for b in range(2):
        for head in range(3):
            for place, source in enumerate(index[b].tolist()):
                assert torch.equal(taken[b, head, place], keys[b, head, source])


def test_lookup_has_an_entry_for_the_sentinel() -> None:
    table = torch.arange(2 * (L + 1)).reshape(2, L + 1)
    assert tokens.lookup(table, packed([[0, 5], [3]])).tolist() == [[0, 5], [12, 17]]


def test_find_columns_gives_the_place_of_each_column() -> None:
    columns = packed([[1, 4, 6, 7], [0, 2]])
    wanted = torch.tensor([[7, 1, 6], [2, 0, 2]])
    assert tokens.find_columns(columns, wanted).tolist() == [[3, 0, 2], [1, 0, 1]]


@pytest.mark.parametrize("absent", [-1, 0, 5, L, L + 50])
def test_find_columns_gives_a_place_in_the_segment_for_an_absent_column(absent: int) -> None:
    place = tokens.find_columns(packed([[1, 4, 6]]), torch.tensor([[absent]]))
    assert 0 <= int(place) < 3


def test_find_columns_finds_sentinels_at_invalid_places() -> None:
    columns = packed([[1, 4]], width=4)
    place = int(tokens.find_columns(columns, torch.tensor([[L]])))
    assert columns[0, place] == L


# Merging.

TEXT = [[0, 1, 5, 7], [0, 3], [2]]
VISION = [[2, 3, 4], [], [3, 4, 5, 6]]


def test_merge_index_puts_text_and_vision_in_prompt_order_and_sentinels_last() -> None:
    text, vision, slots = packed(TEXT), packed(VISION), torch.arange(7)
    index = tokens.merge_index(text, vision, slots)
    both = torch.cat([text, vision], dim=1)
    for b, (ours, theirs) in enumerate(zip(TEXT, VISION, strict=True)):
        columns = sorted(ours + theirs)
        assert both[b, index[b]].tolist() == columns + [L] * (7 - len(columns))
        assert len(set(index[b].tolist())) == 7


def test_merge_index_cuts_to_the_length_of_the_next_segment() -> None:
    text, vision = packed(TEXT, width=6), packed(VISION, width=5)
    index = tokens.merge_index(text, vision, torch.arange(7))
    merged = tokens.merge_columns(text, vision, index)
    assert (
        merged.tolist()
        == packed([sorted(t + v) for t, v in zip(TEXT, VISION, strict=True)]).tolist()
    )


def test_merge_tokens_and_merge_columns_follow_the_same_index() -> None:
    text, vision = packed(TEXT), packed(VISION)
    index = tokens.merge_index(text, vision, torch.arange(5))
    # A token's only feature is its column, so the states must come out as the columns do.
    states = tokens.merge_tokens(text[:, :, None].float(), vision[:, :, None].float(), index)
    assert torch.equal(states[:, :, 0], tokens.merge_columns(text, vision, index).float())


def test_merging_with_no_vision_tokens_returns_the_text() -> None:
    text = packed(TEXT)
    none = torch.zeros(3, 0, dtype=torch.long)
    index = tokens.merge_index(text, none, torch.arange(4))
    assert torch.equal(tokens.merge_columns(text, none, index), text)
    assert torch.equal(
        tokens.merge_tokens(text[:, :, None], none[:, :, None], index), text[:, :, None]
    )


# Numbering.


def test_renumber_counts_places() -> None:
    assert tokens.renumber(packed([[1, 4, 6], [5]])).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_renumber_text_numbers_text_as_if_without_images_and_keeps_vision_ids() -> None:
    vision = [[1, 2, 5], [], [0, 6, 7]]
    ids = torch.arange(L + 1).repeat(3, 1) + torch.tensor([[0], [0], [10]])
    renumbered = tokens.renumber_text(ids, table_of(vision))
    for b, columns in enumerate(vision):
        seen = 0
        for column in range(L):
            if column in columns:
                seen += 1
                assert renumbered[b, column] == ids[b, column]
            else:
                assert renumbered[b, column] == ids[b, column] - seen


# Scores.


def direct_scores(
    query: Tensor, key: Tensor, columns: Tensor, query_columns: Tensor, scale: float
) -> list[list[float]]:
    """Softmax row by row, head by head, in double precision."""
    scores = []
    groups = query.shape[1] // key.shape[1]
    for b, row in enumerate(columns.tolist()):
        total = [0.0] * len(row)
        queries = [(i, c) for i, c in enumerate(query_columns[b].tolist()) if c >= 0]
        for place, own in queries:
            for head in range(query.shape[1]):
                logits = [
                    float(query[b, head, place].double() @ key[b, head // groups, j].double())
                    * scale
                    for j in range(len(row))
                ]
                weights = [
                    math.exp(v) if c <= own else 0.0 for v, c in zip(logits, row, strict=True)
                ]
                for j, weight in enumerate(weights):
                    total[j] += weight / sum(weights) / query.shape[1] / len(queries)
        scores.append(total)
    return scores


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "query_columns",
    [[[6], [4]], [[3, 6], [4, -1]], [[2, 5, 6], [-1, 0, -1]]],
    ids=["one query", "one or two", "absent anywhere"],
)
def test_scores_are_the_mean_softmax_of_the_query_rows(
    heads: int, kv_heads: int, query_columns: list[list[int]]
) -> None:
    columns, wanted = packed([[0, 2, 3, 5, 6], [0, 4]]), torch.tensor(query_columns)
    query, key = random(2, heads, wanted.shape[1], 8), random(2, kv_heads, 5, 8, seed=1)
    scores = attention_scores(query, key, columns, wanted, 0.3)
    assert scores.dtype == torch.float32
    expected = torch.tensor(direct_scores(query, key, columns, wanted, 0.3))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_scores_of_a_row_sum_to_one_and_are_zero_after_the_query_and_at_invalid_tokens() -> None:
    columns = packed([[0, 2, 3, 5, 6], [0, 4]])
    scores = attention_scores(
        random(2, 4, 1, 8), random(2, 2, 5, 8, seed=1), columns, torch.tensor([[3], [4]]), 0.3
    )
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
    assert scores[0, 3:].tolist() == [0, 0]
    assert scores[1, 2:].tolist() == [0, 0, 0]


def test_scores_of_a_row_without_any_query_are_zero_and_finite() -> None:
    scores = attention_scores(
        random(2, 2, 2, 8),
        random(2, 2, 3, 8, seed=1),
        packed([[0, 2, 3], [0, 4]]),
        torch.tensor([[-1, -1], [4, -1]]),
        0.3,
    )
    assert scores[0].tolist() == [0, 0, 0]
    assert torch.isfinite(scores).all()


def test_an_absent_query_row_does_not_matter_however_large() -> None:
    columns, key = packed([[0, 2, 3]]), random(1, 2, 3, 8, seed=1)
    query = random(1, 2, 2, 8)
    alone = attention_scores(query[:, :, :1], key, columns, torch.tensor([[3]]), 0.3)
    query[:, :, 1] = 1e4
    both = attention_scores(query, key, columns, torch.tensor([[3, -1]]), 0.3)
    torch.testing.assert_close(both, alone)


def test_scores_of_half_precision_are_computed_in_fp32() -> None:
    columns, wanted = packed([[0, 2, 3, 5, 6]]), torch.tensor([[6]])
    query, key = random(1, 4, 1, 8).bfloat16(), random(1, 2, 5, 8, seed=1).bfloat16()
    scores = attention_scores(query, key, columns, wanted, 0.3)
    expected = torch.tensor(direct_scores(query, key, columns, wanted, 0.3))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


# What survives.


def best(scores: list[float], row: list[int], vision: list[int], keep: int) -> list[int]:
    """Text and the `keep` best vision columns, in order; a tie goes to the lower column."""
    ranked = sorted((c for c in row if c in vision), key=lambda c: (-scores[row.index(c)], c))
    return sorted([c for c in row if c not in vision] + ranked[:keep])


def test_surviving_columns_keeps_text_and_the_best_vision_tokens_in_prompt_order() -> None:
    rows, vision = [[0, 1, 2, 3, 4, 7], [1, 2, 5]], [[1, 2, 3, 4], [2, 5]]
    scores = torch.tensor([[0.9, 0.1, 0.4, 0.2, 0.3, 0.9], [0.0, 0.2, 0.5, 9.0, 9.0, 9.0]])
    kept = tokens.surviving_columns(
        scores, packed(rows), table_of(vision), torch.tensor([2, 1]), torch.arange(4)
    )
    assert kept.tolist() == [[0, 2, 4, 7], [1, 5, L, L]]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_scores_keep_the_lower_columns_and_exactly_as_many_as_asked(value: float) -> None:
    row, vision = [0, 1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5]
    for keep in range(6):
        kept = tokens.surviving_columns(
            torch.full((1, 7), value), packed([row]), table_of([vision]), torch.tensor([keep]),
            torch.arange(2 + keep),
        )  # fmt: skip
        assert kept.tolist() == [[0, *vision[:keep], 7]]


def test_a_tie_at_the_cut_goes_to_the_lower_column() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.3, 0.3, 0.4]])
    kept = tokens.surviving_columns(
        scores, packed([[0, 1, 2, 3, 4, 5]]), table_of([[1, 2, 3, 4, 5]]), torch.tensor([3]),
        torch.arange(4),
    )  # fmt: skip
    assert kept.tolist() == [[0, 1, 2, 5]]


def test_equal_scores_of_whole_images_keep_the_first_columns() -> None:
    # Long enough for the sorts that are not stable to show it.
    length = 2 * 576
    is_vision = torch.ones(2, length + 1, dtype=torch.bool)
    is_vision[:, [0, length - 1, length]] = False
    kept = tokens.surviving_columns(
        torch.full((2, length), 0.25),
        torch.arange(length).repeat(2, 1),
        is_vision,
        torch.tensor([64, 700]),
        torch.arange(702),
    )
    assert kept[0].tolist() == [*range(65), length - 1, *[length] * (702 - 66)]
    assert kept[1].tolist() == [*range(701), length - 1]


def test_keeping_nothing_leaves_the_text_as_text_columns_does() -> None:
    rows, vision = [[0, 1, 2, 7], [3, 4]], [[1, 2], [3]]
    columns, table = packed(rows), table_of(vision)
    kept = tokens.surviving_columns(
        random(2, 4), columns, table, torch.tensor([0, 0]), torch.arange(2)
    )
    assert kept.tolist() == [[0, 7], [4, L]]
    assert torch.equal(kept, tokens.text_columns(columns, table, torch.arange(2)))


def test_keeping_more_than_there_is_keeps_all() -> None:
    columns = packed([[0, 1, 2, 7]])
    kept = tokens.surviving_columns(
        random(1, 4), columns, table_of([[1, 2]]), torch.tensor([99]), torch.arange(4)
    )
    assert torch.equal(kept, columns)


def test_vision_columns_that_left_before_are_not_counted_again() -> None:
    # The table still marks 1, 2, 3 and 4, but only 2 and 4 came as far as this segment.
    kept = tokens.surviving_columns(
        torch.tensor([[0.0, 0.1, 0.2, 0.0]]), packed([[0, 2, 4, 7]]), table_of([[1, 2, 3, 4]]),
        torch.tensor([1]), torch.arange(3),
    )  # fmt: skip
    assert kept.tolist() == [[0, 4, 7]]


def test_text_columns_of_rows_with_and_without_images() -> None:
    rows, vision = [[0, 1, 2, 7], [3, 4], [5, 6, 7]], [[1, 2], [], [5, 6]]
    kept = tokens.text_columns(packed(rows), table_of(vision), torch.arange(3))
    assert kept.tolist() == [[0, 7, L], [3, 4, L], [7, L, L]]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_prune_equals_sorting_each_row_by_hand(data: st.DataObject) -> None:
    rows, vision, keeps, scores = [], [], [], []
    for _ in range(data.draw(st.integers(1, 3), label="rows")):
        row = sorted(data.draw(st.sets(st.integers(0, L - 1), min_size=1), label="columns"))
        rows.append(row)
        vision.append(sorted(data.draw(st.sets(st.sampled_from(row)), label="vision")))
        keeps.append(data.draw(st.integers(0, L), label="keep"))
        # Few values, so that ties are the rule.
        scores.append([data.draw(st.sampled_from([0.0, 0.25, 0.5])) for _ in range(L)])
    columns = packed(rows)
    given_scores = torch.tensor(scores)[:, : columns.shape[1]]
    expected = [
        best(*case) for case in zip(given_scores.tolist(), rows, vision, keeps, strict=True)
    ]
    width = max(map(len, expected)) or 1
    kept = tokens.surviving_columns(
        given_scores, columns, table_of(vision), torch.tensor(keeps), torch.arange(width)
    )
    assert kept.tolist() == packed(expected, width).tolist()


# All of them.


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (tokens.take_tokens, (random(2, 4, 3), torch.tensor([[3, 0], [1, 1]]))),
        (tokens.find_columns, (packed([[1, 4], [0]]), torch.tensor([[4], [0]]))),
        (tokens.merge_index, (packed(TEXT), packed(VISION), torch.arange(7))),
        (tokens.renumber_text, (torch.arange(L + 1)[None], table_of([[1, 2]]))),
        (
            tokens.surviving_columns,
            (random(1, 3), packed([[0, 1, 2]]), table_of([[1, 2]]), torch.tensor([1]), torch.arange(2)),
        ),
        (
            attention_scores,
            (random(1, 2, 1, 4), random(1, 1, 3, 4), packed([[0, 1, 2]]), torch.tensor([[2]]), 0.5),
        ),
    ],
)  # fmt: skip
def test_token_ops_leave_their_arguments_unchanged(
    function: Callable[..., Tensor], arguments: tuple[Any, ...]
) -> None:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [t.clone() for t in tensors]
    function(*arguments)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
