"""Attention over what a cache holds, in the program of a later turn with images."""

from __future__ import annotations

import torch

from hidrop_fx import passes
from hidrop_fx.ops.attention_scores import attention_scores
from hidrop_fx.ops.behind import (
    attention_behind,
    columns_behind,
    last_present,
    of_new,
    seen_behind,
    with_past,
)
from hidrop_fx.passes.kv_cache import write_kv
from hidrop_fx.pipeline import pipeline
from hidrop_fx.planning import Plan
from hidrop_fx.program.variant import Variant
from hidrop_fx.schedule.schedule import Schedule
from tests.support.captured import FULL, HEAD, KV_HEADS, LAYERS, CapturedModel
from tests.support.graphs import calls, counted, grown, only

BEHIND = Variant(output="chosen", behind=True)


def test_layers_attend_to_the_past_and_write_what_is_new(llama: CapturedModel) -> None:
    program = llama.program("prefill", **FULL)
    steps = pipeline.passes_for("prefill", BEHIND)
    names = [step.__name__ for step, _ in steps]
    assert names[names.index("attention_over_past") + 1 :] == ["kv_cache", "head"]
    assert "attention" not in names
    for step, options in steps:
        if step is passes.attention_over_past:
            break
        program.apply(step, **options)
    own = [region.attention.args[:3] for region in program.regions]
    found = grown(program, passes.attention_over_past)
    assert found == {
        "placeholder": 3 * LAYERS, "seen_behind": 4, "attention_behind": 4,
        "attention.default": -4,
    }  # fmt: skip
    for region, given in zip(program.regions, own, strict=True):
        assert region.attention.args[:3] == given
        shape = program.placeholder_named(f"past_keys_{region.layer}").meta["val"].shape
        assert (shape[0], shape[1], shape[3]) == (program.batch, KV_HEADS, HEAD)
    for step, options in steps[names.index("kv_cache") :]:
        program.apply(step, **options)
    written = sorted(str(node.args[0]) for node in calls(program.graph, write_kv))
    assert written == sorted(f"{n}_{k}" for k in range(LAYERS) for n in ("keys", "values"))


def test_a_score_divides_attention_among_the_past_too(llama: CapturedModel) -> None:
    plan = Plan.of(Schedule(**FULL), LAYERS)
    program = pipeline.build_program(llama.captured, plan, "prefill", BEHIND)
    scores = only(calls(program.graph, attention_scores))
    keys, columns = scores.args[1:3]
    assert (keys.target, str(keys.args[0])) == (with_past, "past_keys_2")
    assert (columns.target, str(columns.args[0])) == (columns_behind, "past_shown_prune_2")
    assert counted(program.graph)["of_new"] == 1
    plain = pipeline.build_program(llama.captured, plan, "prefill", Variant(output="chosen"))
    assert not counted(plain.graph).keys() & {"with_past", "of_new", "attention_behind"}


def test_what_a_turn_sees() -> None:
    """Three of the past, one hidden; two tokens of the turn and a sentinel."""
    columns, shown = torch.tensor([[0, 2, 5]]), torch.tensor([[True, False, True]])
    mask = seen_behind(columns, shown)[0, 0].int().tolist()
    assert mask == [[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]]
    table = torch.zeros(1, 6)
    assert columns_behind(shown, columns, table).tolist() == [[-1, 5, -1, 0, 2, 5]]
    assert of_new(torch.arange(6.0)[None], shown).tolist() == [[3, 4, 5]]


def test_attention_over_two_parts_is_that_over_one() -> None:
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    past = key[:, :, :2], value[:, :, :2]
    columns, shown = torch.arange(3).expand(2, 3), torch.ones(2, 2, dtype=torch.bool)
    new = [each[:, :, 2:] for each in (query, key, value)]
    found = attention_behind(*new, *past, seen_behind(columns, shown), 0.3)
    groups = [each.repeat_interleave(2, dim=1) for each in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *groups, is_causal=True, scale=0.3
    )
    torch.testing.assert_close(found, expected[:, :, 2:])


def test_the_last_vision_token_that_is_there_scores() -> None:
    table = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0]]).bool()
    columns = torch.tensor([[0, 1, 2, 4, 5, 7, 8]])  # 3 and 6 were pruned
    wanted = torch.tensor([[3, 6, 0, -1]])
    assert last_present(columns, wanted, table).tolist() == [[2, 5, 0, -1]]
