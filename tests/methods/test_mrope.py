"""Every published method on models with M-RoPE, Qwen2.5-VL and Qwen3-VL: equal to a reference, or refused by name.

Selections are held against HF's own layers, one after another (`FamilyReference`), with each method's score from HF's attention
weights and hidden states; all stages, those before the decoder and on the cache too, against the plain loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import HidropError, Schedule, ScheduleError, UnsupportedModelError
from hidrop_fx.cli.methods_command import families
from tests.methods.test_published import SMALL
from tests.support.families import CASES, IMAGE, VIDEO
from tests.support.families.case import random_model, text_config
from tests.support.families.grids import MROPE, TOKENS, deepstack_vision, vision
from tests.support.families.reference import FamilyReference
from tests.support.gridded import generated, gridded_batch
from tests.support.runtimes import compiled_eagerly, last_layout

pytestmark = [pytest.mark.usefixtures("one_capture_a_model"), pytest.mark.slow]

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
ROWS: Any = [[5, IMAGE, 6, 7], [8, IMAGE, 9, 10, IMAGE, 11, 12], [13, 14, 15], [16, VIDEO, 3, 19]]
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SCORES = ("last_token", "previous_layer", "state_change")
"""Scores that the reference below knows; the others are random, or decide on more than a score."""
BEFORE_DECODER = ("divprune", "cdpruner", "pooling", "visionzip", "duet", "ppe", "index-preserving")
REFUSED = {
    # By what each says; Qwen3-VL has deepstack, so that no token may go before the decoder, and none stays as it is.
    **{("qwen3_vl", name): "has features between its layers" for name in (*BEFORE_DECODER, "vica")},
    ("qwen3_vl", "sparsevlm"): "averages vision tokens of a row, and Qwen3VL",
    ("qwen3_vl", "twigvlm"): "adds features of its vision tower between its own",
    ("qwen2_5_vl", "visionzip"): "reads the vision tower, and that of",
    ("qwen2_5_vl", "duet"): "reads the vision tower, and that of",
}
ELSEWHERE = ("index-preserving", "random", "pooling")
"""With a module, with chance, and for square grids: in tests of their own."""


def qwen(family: str) -> Any:
    """Six layers, RoPE of 32 dimensions."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 6, "head_dim": 32, "hidden_size": 64, "num_attention_heads": 2,
        "rope_parameters": {**MROPE, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    if family == "qwen3_vl":
        text = text_config(hf.Qwen3VLTextConfig, **sizes)
        tower = {**deepstack_vision(), "out_hidden_size": 64}
        config = hf.Qwen3VLConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
        return random_model(hf.Qwen3VLForConditionalGeneration, config)
    text = text_config(hf.Qwen2_5_VLTextConfig, **sizes)
    tower = vision(window_size=16, fullatt_block_indexes=[1], out_hidden_size=64)
    config = hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen2_5_VLForConditionalGeneration, config)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: qwen(family) for family in FAMILIES}


def on_several_axes(name: str) -> Schedule:
    """A method's schedule for six layers; tokens with ids on several axes cannot be renumbered."""
    schedule = Schedule.parse(SMALL[name], 6)
    return (
        replace(schedule, positions="persistent") if schedule.positions == "compact" else schedule
    )


class Scoring(FamilyReference):
    """The reference, with the scores of FastV and of V2Drop."""

    def _layer(
        self,
        layer: Any,
        index: int,
        hidden: Tensor,
        columns: list[int],
        ids: Tensor,
        *,
        scoring: bool = False,
    ) -> tuple[Tensor, Tensor]:
        found = super()._layer(layer, index, hidden, columns, ids, scoring=scoring)
        if not scoring:
            self.before = layer, index, hidden, list(columns)
        return found

    def _scores(
        self,
        layer: Any,
        index: int,
        hidden: Tensor,
        columns: list[int],
        ids: Tensor,
        queries: Sequence[int],
    ) -> dict[int, float]:
        if self.schedule.score == "last_token":
            return super()._scores(layer, index, hidden, columns, ids, list(queries))
        earlier, at, states, there = self.before
        if self.schedule.score == "previous_layer":
            return super()._scores(earlier, at, states, there, ids, list(queries))
        change = (hidden - states[[there.index(c) for c in columns]]).norm(dim=-1)
        return dict(zip(columns, change.tolist(), strict=True))


IN_THE_DECODER = [
    name
    for name in SMALL
    if not Schedule.preset(name).before
    and not Schedule.preset(name).cache
    and Schedule.preset(name).reads is None
    and Schedule.preset(name).score in SCORES
    and not Schedule.preset(name).modules
    and name != "voco"  # which is no selection
]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IN_THE_DECODER)
@torch.no_grad()
def test_a_selection_equals_the_reference(
    name: str, family: str, padding: Any, models: dict[str, Any]
) -> None:
    """Tokens of each layer, logits, and four tokens that follow."""
    model, schedule, case = models[family], on_several_axes(name), CASES[family]
    made = gridded_batch(
        case, model, ROWS, images=[(1, 8, 10), (1, 6, 6)], videos=[(2, 4, 6)], padding=padding
    )
    reference = Scoring(model, schedule, case)
    counts = [int(row.vision.sum()) for row in made.rows]
    # Shares that are rounded as the method's authors do.
    rows = []
    for row, count in zip(made.rows, counts, strict=True):
        own = replace(schedule, prune=schedule.keep_counts(count, row.items) if count else {})
        reference.schedule = replace(own, rounding="half_up", per="sample")
        found = reference.run(replace(row, items=1), reference.embeds(row))
        said, _ = reference.generate(replace(row, items=1), reference.embeds(row), 4)
        rows.append((found, said))
    with compiled_eagerly(model, schedule):
        output = model(**made.inputs)
        layout = last_layout(model)
        for b, (row, (found, _)) in enumerate(zip(made.rows, rows, strict=True)):
            where = row.columns[found.columns]
            torch.testing.assert_close(output.logits[b, where], found.logits, **CLOSE)
        seen = [layer.query for layer in layout.plan.layers]
        assert [layout.counts[s] for s in seen] == [
            list(each) for each in zip(*(found.tokens for found, _ in rows), strict=True)
        ]
        assert generated(model, made) == [said for _, said in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in SMALL if name not in ELSEWHERE])
@torch.no_grad()
def test_every_method_runs_as_the_plain_loop_or_is_refused(
    name: str, family: str, models: dict[str, Any]
) -> None:
    model, schedule = models[family], on_several_axes(name)
    given: dict[str, Any] = {"backend": "eager"}
    if "twig" in schedule.modules:
        given["modules"] = {"twig": hidrop.grow_twig(model, layers=2)}
    refused = REFUSED.get((family, name))
    if refused is not None:
        with pytest.raises((UnsupportedModelError, ScheduleError), match=refused):
            hidrop.compile(model, schedule, **given)
        assert not hidrop.is_compiled(model)
        return
    made = gridded_batch(
        CASES[family], model, ROWS, images=[(1, 8, 10), (1, 6, 6)], videos=[(2, 4, 6)]
    )
    hidrop.compile(model, schedule, **given)
    try:
        report = hidrop.compare(model, **made.inputs)
        assert report.ok, str(report)
        plain = generated(model, made)
        hidrop.compile(model, schedule, **given, cuda_graphs=True)
        assert [generated(model, made) for _ in range(2)] == [plain, plain]
    finally:
        hidrop.restore(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "index-preserving"])
def test_the_table_of_methods_says_which_families_are_refused(
    name: str, family: str, models: dict[str, Any]
) -> None:
    model, schedule = models[family], Schedule.parse(SMALL[name], 6)
    modules = {"twig": hidrop.grow_twig(model, layers=2)} if "twig" in schedule.modules else {}
    base, _, without = families(schedule).partition("; not ")
    fits = base in ("all", "M-RoPE") and "M-RoPE" not in without
    if family == "qwen3_vl":
        fits = fits and "deepstack" not in without
    try:
        hidrop.compile(model, schedule, backend="eager", modules=modules)
    except HidropError:
        assert not fits
    else:
        hidrop.restore(model)
        assert fits


def test_what_is_refused_is_a_method() -> None:
    assert {name for _, name in REFUSED} <= set(SMALL)
    assert set(ELSEWHERE) <= set(SMALL)
