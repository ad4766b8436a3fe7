"""Dropped tokens that are merged into kept ones: a compiled model computes what the eager reference computes.

Schedules, batches and paddings are drawn at random, as in `test_equality`; rows have no image, one or several.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st

import hidrop_fx as hidrop
from tests.generate.test_equality import (
    AMBIGUOUS,
    NEW_TOKENS,
    ambiguous,
    batches,
    check_cache,
    check_layout,
    compare_logits,
)
from tests.support.families import CASES as FAMILIES
from tests.support.families import IMAGE as FAMILY_IMAGE
from tests.support.families import make_batch
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, batch, schedules, supervised, tiny_llava
from tests.support.reference import (
    reference_generate,
    reference_generations,
    reference_logits,
    reference_rows,
    split_batch,
)
from tests.support.runtimes import compiled_eagerly
from tests.training.test_equality import cases, compare, labelled

LAYERS = 3
SCORES = ("last_token", "all_text", "previous_layer", "state_change")
MERGED = "inject=1,prune=1:6+2:3,exit=3,merge=nearest_key"
ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [4, 5, 6, 7], [IMAGE, 5, IMAGE, 12, 13]]
slow = pytest.mark.slow
each_model = pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("llama", {"kv_heads": 2}),
        pytest.param("mistral", {"sliding_window": 6, "kv_heads": 2}, marks=slow),
        pytest.param("qwen2", {"sliding_window": 6, "image_tokens": 4}, marks=slow),
        pytest.param("qwen3", {"kv_heads": 1}, marks=slow),
    ],
)
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def merging(scores: Any = SCORES, **options: Any) -> st.SearchStrategy[dict[str, Any]]:
    drawn = schedules(LAYERS, scores=[s for s in scores if s != "all_text"], **options)
    return drawn.filter(lambda fields: fields["prune"]).map(
        lambda fields: fields | {"merge": "nearest_key"}
    )


@each_model
def test_random_merges_generate_what_the_reference_generates(
    backbone: str, options: dict[str, Any]
) -> None:
    model, seen = tiny_llava(backbone, num_layers=LAYERS, **options), Counter[str]()

    @seed(1)
    @settings(max_examples=5, phases=(Phase.generate,))
    @given(
        merging(image_tokens=options.get("image_tokens", 9)),
        st.lists(batches(), min_size=4, max_size=4),
    )
    def run(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule = hidrop.Schedule(**arguments)
        with compiled_eagerly(model, schedule):
            for case in drawn:
                inputs = batch(model, **case)
                expected = reference_generations(model, schedule, inputs, NEW_TOKENS)
                known = not any(map(ambiguous, expected))
                seen["clear" if known else "ambiguous"] += 1
                if not known:
                    continue
                output = model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    return_dict_in_generate=True,
                )
                new = output.sequences[:, inputs["input_ids"].shape[1] :]
                assert new.tolist() == [generation.tokens for generation in expected]
                check_layout(model, schedule, [generation.prompt for generation in expected])
                rows = split_batch(model, inputs)
                check_cache(model, output.past_key_values, rows, expected)
                with torch.no_grad():
                    compare_logits(
                        model(**inputs).logits, reference_logits(model, schedule, inputs)
                    )

    run()
    assert seen["clear"] >= 16
    assert seen["ambiguous"] <= 0.1 * seen.total()


@each_model
def test_random_merges_give_loss_and_gradients_of_the_reference(
    backbone: str, options: dict[str, Any]
) -> None:
    model, seen = tiny_llava(backbone, num_layers=LAYERS, **options).train(), Counter[str]()

    @seed(2)
    @settings(max_examples=4, phases=(Phase.generate,))
    @given(
        merging(image_tokens=options.get("image_tokens", 9)),
        st.lists(cases(), min_size=3, max_size=3),
    )
    def run(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule, clear = hidrop.Schedule(**arguments), 0
        with compiled_eagerly(model, schedule):
            for case in drawn:
                inputs = labelled(model, case)
                rows = reference_rows(model, schedule, inputs)
                known = all(row.gap > AMBIGUOUS for row in rows)
                seen["clear" if known else "ambiguous"] += 1
                if known:
                    compare(model, schedule, inputs)
                    clear += 1
        assume(clear)

    run()
    assert seen["clear"] >= 10


def test_a_merge_changes_what_is_left_and_only_that() -> None:
    model: Any = tiny_llava()
    inputs = batch(model, ROWS)
    plain, merged = (hidrop.Schedule.parse(s) for s in (MERGED.partition(",merge")[0], MERGED))
    hidrop.compile(model, {"plain": plain, "merged": merged}, backend="eager")
    with torch.no_grad():
        found = {name: model(**inputs, hidrop_schedule=name) for name in ("plain", "merged")}
    filled = [[x.filled for x in one.past_key_values.layers] for one in found.values()]
    assert filled[0] == filled[1]
    assert torch.equal(found["plain"].logits[1], found["merged"].logits[1]), "no image"
    assert not torch.allclose(found["plain"].logits[0], found["merged"].logits[0], atol=1e-3)
    with hidrop.use(model, "inject=1,prune=1:1.0,merge=nearest_key"), torch.no_grad():
        nothing = model(**inputs).logits
    with hidrop.use(model, "inject=1"), torch.no_grad():
        torch.testing.assert_close(nothing, model(**inputs).logits)


def test_learned_counts_and_checkpointing_merge_too() -> None:
    learned = "inject=1,prune=1:6+2:3,selection=dtopk,merge=nearest_key"
    model = hidrop.compile(tiny_llava(num_layers=3), learned, backend="eager").train()
    inputs = supervised(model, ROWS)
    loss = model(**inputs).loss
    loss.backward()
    fixed = hidrop.Schedule.parse(learned.replace("selection=dtopk,", ""))
    expected = reference_logits(tiny_llava(num_layers=3), fixed, inputs)
    assert model.hidrop_ratios.values.grad.abs().min() > 0
    torch.testing.assert_close(
        loss, model.loss_function(expected, inputs["labels"], expected.shape[-1]), rtol=1e-4, atol=0
    )
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_reports_and_the_loop_know_of_merges() -> None:
    model = hidrop.compile(tiny_llava(), MERGED, backend="eager")
    inputs = batch(model, ROWS, padding="right")
    new_tokens(model, inputs, 2)
    assert "merge=nearest_key" in str(hidrop.inspect(model))
    explained = hidrop.explain(model, **inputs)
    plain = hidrop.explain(model, schedule=MERGED.partition(",merge")[0], **inputs)
    assert explained.flops > plain.flops
    assert explained.kv_bytes == plain.kv_bytes
    compared = hidrop.compare(model, **inputs, new_tokens=2)
    assert compared.ok, str(compared)


def test_cost_of_a_merge_by_hand() -> None:
    sizes = {"num_layers": 4, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 3, "vocab_size": 0, "dtype_bytes": 2}
    given = {**sizes, "text_tokens": 5, "vision_tokens": 20}
    for score, projected in (("last_token", 5 + 6), ("state_change", 5 + 20)):
        schedule = f"prune=2:6,score={score}"
        plain = hidrop.plan(schedule, **given)
        merged = hidrop.plan(f"{schedule},merge=nearest_key", **given)
        found = merged.flops - plain.flops
        # Keys projected again, cosines of 2 x 3 wide keys, sums of 8 wide states: 11 of 25 tokens.
        assert found == 2 * (projected * 8 * 6 + 25 * 11 * (6 + 8))
        assert merged.event_flops["prune_2"] - plain.event_flops["prune_2"] == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prune": {2: 3}, "merge": "mean"},
            r"unknown merge='mean': choose one of nearest_key, recycle, or",
        ),
        ({"prune": {2: 3}, "merge": 7}, r"unknown merge=7"),
        ({"exit": 2, "merge": "nearest_key"}, r"merge='nearest_key' is about tokens that filter"),
    ],
)
def test_wrong_merges_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hidrop.ScheduleError, match=message):
        hidrop.Schedule(**fields)


def test_a_merge_is_read_and_written() -> None:
    schedule = hidrop.Schedule.parse(MERGED)
    assert schedule.merge == "nearest_key"
    assert str(schedule) == MERGED
    assert hidrop.Schedule.from_json(schedule.to_json()) == schedule
    assert hidrop.Schedule.parse("fastv").merge is None


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_models_that_know_more_of_a_token_than_its_state_are_refused(family: str) -> None:
    model = FAMILIES[family].make()
    with pytest.raises(hidrop.UnsupportedModelError, match=r"averages vision tokens of a row, and"):
        hidrop.compile(model, "prune=1:2,merge=nearest_key", backend="eager")
    assert not hidrop.is_compiled(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava_pixtral"])
def test_other_families_merge_as_the_loop_does(family: str) -> None:
    case = FAMILIES[family]
    model = hidrop.compile(case.make(), "prune=1:0.3,merge=nearest_key", backend="eager")
    inputs = make_batch(case, model, [[5, FAMILY_IMAGE, 7], [8, 9]]).inputs
    compared = hidrop.compare(model, **inputs, new_tokens=2)
    assert compared.ok, str(compared)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"backend": "aot_eager"}, {}, {"cuda_graphs": True, "backend": "eager"}], ids=str
)
def test_compiled_and_recorded_merges_are_the_eager_ones(options: dict[str, Any]) -> None:
    given = {"backend": "inductor"} | options
    model = hidrop.compile(tiny_llava(), MERGED, **given)
    for padding in ("left", "right"):
        inputs = batch(model, ROWS, padding=padding)
        schedule = hidrop.Schedule.parse(MERGED)
        for _ in range(2):
            found = new_tokens(model, inputs, 4)
            assert found == reference_generate(tiny_llava(), schedule, inputs, 4)
    labelled_ = supervised(model.train(), ROWS)
    eager = hidrop.compile(tiny_llava(), MERGED, backend="eager").train()
    model(**labelled_).loss.backward()
    eager(**labelled_).loss.backward()
    theirs = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
