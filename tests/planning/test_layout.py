"""Batches laid out as segments: padding on either side, any number of images, labels, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hidrop_fx import InputError, Schedule
from hidrop_fx.ops.columns import pack
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import IGNORE, Layout, count_images, lay_out
from tests.support.models import schedules
from tests.support.programs import layout_inputs

LAYERS = 4


def layout_of(
    rows: list[str],
    schedule: Schedule | None = None,
    *,
    labels: list[str] | None = None,
    image_tokens: int = 3,
    position_ids: Tensor | None = None,
) -> Layout:
    """Lay out rows of "t" (text), "v" (vision place) and "." (padding); labels are "x" or ".".

    All rows must be equally long.
    """
    valid = torch.tensor([[c != "." for c in row] for row in rows])
    placeholder = torch.tensor([[c == "v" for c in row] for row in rows])
    if position_ids is None:
        position_ids = torch.arange(valid.shape[1]).repeat(len(rows), 1)
    given = None
    if labels is not None:
        given = torch.tensor([[7 if c == "x" else IGNORE for c in row] for row in labels])
    return lay_out(
        Plan.of(schedule or Schedule(), LAYERS),
        valid=valid,
        placeholder=placeholder,
        position_ids=position_ids,
        images=[row.count("v") // image_tokens for row in rows],
        labels=given,
    )


def inputs_of(layout: Layout, name: str) -> Any:
    return layout_inputs(layout)[name].tolist()


# Streams.


def test_layout_of_a_row_without_padding_keeps_columns() -> None:
    layout = layout_of(["tvvvttt"])
    assert inputs_of(layout, "text_columns") == [[0, 4, 5, 6]]
    assert inputs_of(layout, "vision_columns") == [[1, 2, 3]]
    assert inputs_of(layout, "query_columns") == [[6]]
    assert inputs_of(layout, "output_columns") == [[6]]
    assert inputs_of(layout, "slots_inject_0") == list(range(7))
    assert layout.lengths == {"text": 4, "inject_0": 7}
    assert layout.counts == {"text": [4], "inject_0": [7]}
    assert layout.vision_counts == {"text": [0], "inject_0": [3]}
    assert (layout.columns, layout.last, layout.images) == (7, [6], [1])
    assert not layout.ragged
    assert not layout.needs_features


@pytest.mark.parametrize(
    "rows", [["tvvvtt", "..tttt"], ["tvvvtt", "tttt.."]], ids=["left", "right"]
)
def test_layout_moves_padding_to_the_end(rows: list[str]) -> None:
    layout = layout_of(rows)
    first = rows[1].index("t")
    assert inputs_of(layout, "text_columns") == [[0, 4, 5, 6], [first + i for i in range(4)]]
    assert inputs_of(layout, "vision_columns") == [[1, 2, 3], [6, 6, 6]]
    assert layout.last == [5, first + 3]
    assert inputs_of(layout, "query_columns") == inputs_of(layout, "output_columns")
    assert inputs_of(layout, "output_columns") == [[5], [first + 3]]
    assert layout.counts == {"text": [3, 4], "inject_0": [6, 4]}
    assert layout.lengths == {"text": 4, "inject_0": 6}
    assert layout.ragged


def test_layout_tables_have_a_place_for_the_sentinel() -> None:
    layout = layout_of([".tvvvt"], position_ids=torch.arange(6)[None] + 10)
    assert inputs_of(layout, "column_position_ids") == [[10, 11, 12, 13, 14, 15, 0]]
    assert inputs_of(layout, "column_is_vision") == [[c == "v" for c in ".tvvvt"] + [False]]


def test_layout_without_images_has_no_vision_columns() -> None:
    layout = layout_of(["tttt", "..tt"], Schedule(inject=1, prune={2: 2}, exit=3))
    assert layout_inputs(layout)["vision_columns"].shape == (2, 0)
    assert inputs_of(layout, "keep_2") == [0, 0]
    assert set(layout.lengths.values()) == {4}
    assert layout.images == [0, 0]


def test_layout_counts_images_row_by_row() -> None:
    layout = layout_of(["vvvtvvvt", "...tvvvt", "......tt"])
    assert inputs_of(layout, "vision_columns") == [
        [0, 1, 2, 4, 5, 6], [4, 5, 6, 8, 8, 8], [8] * 6,
    ]  # fmt: skip
    assert layout.vision_counts["inject_0"] == [6, 3, 0]


def test_an_image_at_the_end_gives_its_last_token_to_the_text_stream() -> None:
    layout = layout_of(["ttvvv", "tvvvt"])
    assert inputs_of(layout, "text_columns") == [[0, 1, 4], [0, 4, 5]]
    assert inputs_of(layout, "vision_columns") == [[2, 3, 5], [1, 2, 3]]
    assert layout.needs_features
    assert inputs_of(layout, "column_is_vision")[0] == [False, False, True, True, False, False]


def test_segments_of_a_single_token_are_widened_by_an_invalid_one() -> None:
    layout = layout_of(["t"])
    assert layout.lengths == {"text": 2, "inject_0": 2}
    assert inputs_of(layout, "text_columns") == [[0, 1]]
    assert layout.ragged
    image = layout_of(["vvv"], Schedule(inject=1, exit=2))
    assert inputs_of(image, "text_columns") == [[2, 3]]
    assert image.lengths == {"text": 2, "inject_1": 3, "exit_2": 2}


def test_every_event_has_its_slots_and_every_prune_its_keep() -> None:
    layout = layout_of(["tvvvvvvt", "tvvvt..."], Schedule(inject=1, prune={1: 2, 2: 1}, exit=3))
    assert list(layout.lengths) == ["text", "inject_1", "prune_1", "prune_2", "exit_3"]
    assert list(layout.lengths.values()) == [2, 8, 6, 4, 2]
    for name, length in list(layout.lengths.items())[1:]:
        assert inputs_of(layout, f"slots_{name}") == list(range(length))
    # Two tokens an image, and the first row has two images.
    assert inputs_of(layout, "keep_1") == [4, 2]
    assert inputs_of(layout, "keep_2") == [2, 1]
    assert layout.vision_counts["exit_3"] == [0, 0]
    assert layout.counts["prune_1"] == [6, 4]


def test_fractions_are_of_the_rows_own_vision_stream() -> None:
    layout = layout_of(["tvvvvvvt", "tvvvt...", "tt......"], Schedule(prune={1: 0.5, 2: 0.1}))
    # Halves round up, and what is there is never cut to nothing.
    assert inputs_of(layout, "keep_1") == [3, 2, 0]
    assert inputs_of(layout, "keep_2") == [1, 1, 0]


def test_an_exit_after_the_last_layer_is_no_event() -> None:
    assert list(layout_of(["tvvvt"], Schedule(exit=LAYERS)).lengths) == ["text", "inject_0"]


# Labels.


def test_each_answer_has_a_query_just_before_it() -> None:
    layout = layout_of(["tvvvttttt", "tttt....."], labels=["......x.x", "..xx....."])
    assert inputs_of(layout, "query_columns") == [[5, 7], [1, -1]]


def test_without_a_supervised_position_the_query_is_the_last_token() -> None:
    layout = layout_of(["tvvvttt", "tvvvt..", "..ttttt"], labels=["." * 7, "." * 7, "....xx."])
    assert inputs_of(layout, "query_columns") == [[6, -1], [4, -1], [3, -1]]


def test_an_answer_from_the_first_token_on_has_nothing_before_it() -> None:
    assert inputs_of(layout_of(["ttvvvt"], labels=["xx...."]), "query_columns") == [[5, -1]]


@pytest.mark.parametrize("rows", [["..tttt"], ["tttt.."]], ids=["left", "right"])
def test_labels_at_padding_ask_for_nothing(rows: list[str]) -> None:
    labels = ["x" if c == "." else "." for c in rows[0]]
    layout = layout_of(rows, labels=["".join(labels)])
    assert inputs_of(layout, "query_columns") == [[layout.last[0], -1]]


def test_a_label_at_a_masked_place_within_the_row_asks_for_nothing() -> None:
    layout = layout_of(["tvv.vvt"], labels=["...x..."], image_tokens=4)
    assert inputs_of(layout, "vision_columns") == [[1, 2, 4, 5]]
    assert inputs_of(layout, "query_columns") == [[6, -1]]


def test_a_place_that_predicts_a_label_is_text_even_in_an_image() -> None:
    layout = layout_of(["tvvvtvvvtt"], labels=["....x...x."])
    assert inputs_of(layout, "text_columns") == [[0, 3, 4, 7, 8, 9]]
    assert inputs_of(layout, "vision_columns") == [[1, 2, 5, 6]]
    assert inputs_of(layout, "query_columns") == [[3, 7]]
    assert layout.needs_features


def test_labels_do_not_change_which_row_is_the_output() -> None:
    assert inputs_of(layout_of(["tvvvttt"], labels=["....xx."]), "output_columns") == [[6]]


# Next position ids.


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("persistent", {"text": 7, "inject_1": 7, "prune_2": 7, "exit_3": 7}),
        ("compact", {"text": 7, "inject_1": 7, "prune_2": 5, "exit_3": 4}),
        ("group", {"text": 4, "inject_1": 4, "prune_2": 4, "exit_3": 4}),
    ],
)
def test_decode_continues_from_each_segments_own_last_id(
    positions: str, expected: dict[str, int]
) -> None:
    schedule = Schedule(inject=1, prune={2: 1}, exit=3, positions=positions)
    layout = layout_of(["tvvvttt"], schedule)
    assert layout.next_ids == {name: [value] for name, value in expected.items()}


def test_next_ids_follow_padding_and_given_ids_row_by_row() -> None:
    ids = torch.tensor([[1, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    rows = ["..tvvvt", "tvvvttt"]
    assert layout_of(rows, position_ids=ids).next_ids["inject_0"] == [5, 7]
    grouped = layout_of(rows, Schedule(positions="group"), position_ids=ids)
    assert grouped.next_ids["inject_0"] == [2, 4]
    compact = layout_of(rows, Schedule(prune={1: 1}, positions="compact"), position_ids=ids)
    assert compact.next_ids == {"text": [5, 7], "inject_0": [5, 7], "prune_1": [3, 5]}


# Packing, counting images, errors.


def test_pack_keeps_the_order_and_fills_with_the_sentinel() -> None:
    chosen = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    assert pack(chosen).tolist() == [[1, 2, 4], [0, 5, 5]]
    assert pack(chosen).is_contiguous()


@pytest.mark.parametrize(("shortest", "width"), [(0, 0), (1, 1), (2, 2), (5, 5)])
def test_pack_of_nothing_is_as_wide_as_asked(shortest: int, width: int) -> None:
    packed = pack(torch.zeros(2, 3, dtype=torch.bool), shortest=shortest)
    assert packed.tolist() == [[3] * width] * 2


def test_count_images_goes_through_the_images_in_order() -> None:
    placeholder = torch.tensor([[c == "v" for c in row] for row in ["vvvvvt", "tttttt", "tvvvvv"]])
    assert count_images(placeholder, [3, 2, 5]) == [2, 0, 1]
    assert count_images(placeholder[1:2], []) == [0]


def test_count_images_error_names_both_totals() -> None:
    placeholder = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(
        InputError,
        match=r"the prompt has 3 image placeholder tokens \(\[2, 1\] by row\), but the images have 4 "
        r"features \(2 images of \[2\] tokens\).*processor",
    ):
        count_images(placeholder, [2, 2])


def test_count_images_error_names_the_row_whose_image_is_cut() -> None:
    placeholder = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    with pytest.raises(
        InputError,
        match=r"row 1 has 1 image placeholder tokens, which is not a whole number of images: the next "
        r"ones end at 2; was its text truncated\?",
    ):
        count_images(placeholder, [2, 2, 2])


def test_layout_refuses_a_row_of_padding_alone() -> None:
    with pytest.raises(InputError, match=r"row 1 of the batch is padding only; remove it"):
        layout_of(["tvvvt", "....."])


# Any batch.


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[str], list[str] | None]:
    """Rows of one length, with images of 3 tokens and padding on one side, and labels or none."""
    pieces = st.lists(st.sampled_from(["t", "vvv"]), min_size=1, max_size=6).map("".join)
    rows = draw(st.lists(pieces, min_size=1, max_size=4))
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    left = draw(st.booleans())
    padded = [row.rjust(width, ".") if left else row.ljust(width, ".") for row in rows]
    if draw(st.booleans()):
        return padded, None
    marks = st.lists(st.sampled_from(".x"), min_size=width, max_size=width).map("".join)
    return padded, draw(st.lists(marks, min_size=len(rows), max_size=len(rows)))


@settings(max_examples=100, deadline=None)
@given(prompt=prompts(), options=schedules(LAYERS, image_tokens=3))
def test_text_and_vision_partition_the_valid_columns(
    prompt: tuple[list[str], list[str] | None], options: dict[str, Any]
) -> None:
    rows, labels = prompt
    layout = layout_of(rows, Schedule(**options), labels=labels)
    length = len(rows[0])
    queries, tables = inputs_of(layout, "query_columns"), inputs_of(layout, "column_is_vision")
    for b, row in enumerate(rows):
        valid = [c for c in range(length) if row[c] != "."]
        segments = {}
        for name in ("text", "vision"):
            columns = inputs_of(layout, f"{name}_columns")[b]
            segments[name] = [c for c in columns if c < length]
            assert columns == segments[name] + [length] * (len(columns) - len(segments[name]))
            assert segments[name] == sorted(set(segments[name]))
        assert sorted(segments["text"] + segments["vision"]) == valid
        assert all(row[c] == "v" for c in segments["vision"])
        assert layout.last[b] == valid[-1]
        assert valid[-1] in segments["text"]
        asked = [c for c in queries[b] if c >= 0]
        assert asked
        assert set(asked) <= set(segments["text"])
        assert [c for c, marked in enumerate(tables[b]) if marked] == segments["vision"]
        if labels is not None:
            supervised = [c for c in valid[1:] if labels[b][c] == "x" and c - 1 in valid]
            assert {c - 1 for c in supervised} <= set(segments["text"])
        assert layout.counts["text"][b] == len(segments["text"])
        left = len(segments["vision"])
        for name, alive in layout.vision_counts.items():
            assert alive[b] <= (0 if name == "text" else left)
            left = left if name == "text" else alive[b]
            assert layout.counts[name][b] == len(segments["text"]) + alive[b]
            assert layout.counts[name][b] <= layout.lengths[name]
