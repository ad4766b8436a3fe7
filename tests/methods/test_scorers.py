"""Scorers: registration and its errors, every need of a score function, and a user's scorer through the whole package.

Over 400 lines: the scores of one table go through every part of the package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import PassError, Schedule, ScheduleError, register_scorer
from hidrop_fx.inspection.batch import prepare_batch
from hidrop_fx.methods import POSITION_RULES, RANKS, SCORERS, SELECTIONS, Deferred, Scorer
from hidrop_fx.methods.needs import GIVEN, NEEDS
from hidrop_fx.methods.queries import Prompt
from hidrop_fx.reference.loop import Events, run_loop
from tests.support.models import IMAGE, batch, random_labels, tiny_llava

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]
BUILT_IN = tuple(SCORERS)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=5, kv_heads=2)


def key_norm(key: Tensor) -> Tensor:
    """Negative norm of the keys, mean over heads."""
    return -key.float().norm(dim=-1).mean(dim=1)


def value_norm(value: Tensor) -> Tensor:
    return value.float().norm(dim=-1).mean(dim=1)


def hidden_norm(hidden: Tensor) -> Tensor:
    return hidden.float().norm(dim=-1)


def change(hidden: Tensor, previous_hidden: Tensor) -> Tensor:
    return (hidden - previous_hidden).float().norm(dim=-1)


def far_from_the_mean_key(key: Tensor, is_vision: Tensor) -> Tensor:
    keys, weight = key.float().flatten(2) if key.dim() == 3 else key.float().mean(dim=1), is_vision
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (keys * weight[:, :, None]).sum(dim=1) / count
    return (keys - mean[:, None]).norm(dim=-1)


def late_columns(columns: Tensor) -> Tensor:
    return columns.float()


def largest_logit(query: Tensor, key: Tensor, scale: float, query_columns: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    logits = query.float() @ key.float().repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    absent = (query_columns < 0)[:, None, :, None]
    return logits.masked_fill(absent, float("-inf")).amax(dim=(1, 2))


SCORES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        key_norm,
        value_norm,
        hidden_norm,
        change,
        far_from_the_mean_key,
        late_columns,
        largest_logit,
    )
}


# Registration.


def test_a_registered_scorer_is_known_to_schedules_in_every_form() -> None:
    assert register_scorer("mine")(key_norm) is key_norm
    schedule = Schedule.parse("prune=2:0.5,score=mine")
    assert schedule.scorer is SCORERS["mine"]
    assert schedule == Schedule(prune={2: 0.5}, score="mine")
    assert str(schedule) == "prune=2:0.5,score=mine"
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_a_score_function_declares_its_needs_by_its_parameters() -> None:
    register_scorer("mine")(largest_logit)
    scorer = SCORERS["mine"]
    assert scorer.parameters == ("query", "key", "scale", "query_columns")
    assert scorer.needs == {"query", "key"}
    register_scorer("other")(key_norm)
    assert SCORERS["other"].description == "Negative norm of the keys, mean over heads."


def test_the_scorers_that_are_there_from_the_start() -> None:
    assert BUILT_IN[0] == SCORERS.default == Schedule().score == "last_token"
    attention = ("last_token", "last_token_one_round", "last_token_l2", "all_text", "all_text_l2")
    assert (
        *attention,
        "value_similarity",
        "previous_layer",
        "random",
        "raters",
        "gravity_raters",
        "state_change",
        "twig",
    ) == BUILT_IN
    assert [name for name in BUILT_IN if not SCORERS[name].deterministic] == ["random"]
    assert tuple(POSITION_RULES) == ("persistent", "compact", "gapless", "group")
    assert tuple(SELECTIONS) == ("hard", "dtopk")
    assert tuple(RANKS) == ("hard", "soft")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_deferred_score_function_has_the_parameters_that_it_is_said_to_have(name: str) -> None:
    scorer = SCORERS[name]
    named = (*scorer.parameters, *scorer.optional, *scorer.defaults)
    assert named == tuple(inspect.signature(scorer.function).parameters)
    assert scorer.description


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    register_scorer("mine")(key_norm)
    with pytest.raises(
        ScheduleError,
        match=r"unknown score='yours': choose one of last_token, .*random, .*state_change, .*mine; .*register_scorer first",
    ):
        Schedule(score="yours")


def test_a_taken_name_is_refused_unless_it_is_to_be_replaced() -> None:
    register_scorer("mine")(key_norm)
    register_scorer("mine")(key_norm)  # the same again: a module imported twice
    with pytest.raises(
        ScheduleError, match=r"score='mine' is registered already, as key_norm\(key\)"
    ):
        register_scorer("mine")(value_norm)
    with pytest.raises(ScheduleError, match="score='last_token' is registered already"):
        register_scorer("last_token")(value_norm)
    assert SCORERS["mine"].function is key_norm
    register_scorer("mine", replace=True)(value_norm)
    assert SCORERS["mine"].function is value_norm


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=b", "prune:1", 3, None])
def test_a_name_that_the_text_form_cannot_hold_is_refused(name: Any) -> None:
    with pytest.raises(ScheduleError, match="a scorer cannot be called"):
        register_scorer(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda keys: keys, r"nothing is known as 'keys'.*may ask for query, key, value, hidden"),
        (lambda *key: key, r"nothing is known as '\*key'"),
        (lambda **rest: rest, r"nothing is known as '\*rest'"),
        (lambda: None, r"has no parameter; give it `columns`"),
        ("key_norm", r"'key_norm' is no function"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        register_scorer("mine")(function)
    assert "mine" not in SCORERS


def test_a_parameter_with_a_default_keeps_it() -> None:
    register_scorer("mine")(lambda columns, power=2: columns.float() ** power)
    assert SCORERS["mine"].parameters == ("columns",)


# Needs.


def test_needs_are_a_closed_list_of_what_is_given_or_coming() -> None:
    assert not NEEDS.keys() & GIVEN.keys()
    assert {name for name, need in NEEDS.items() if not need.provided} == {
        *("hidden_after", "features", "tower_attention"),
    }


@pytest.mark.parametrize("need", [name for name, need in NEEDS.items() if not need.provided])
def test_a_need_that_no_pass_provides_can_be_registered_and_not_used(need: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def score({need}): return {need}", space)
    register_scorer("mine")(space["score"])
    Schedule(score="mine")  # prunes nowhere
    with pytest.raises(ScheduleError, match=f"score='mine' needs '{need}' .*no pass provides yet"):
        Schedule(prune={2: 0.5}, score="mine")


def test_the_layer_before_must_have_run_on_the_same_tokens() -> None:
    register_scorer("mine")(change)
    Schedule(inject=1, prune={2: 4, 3: 2}, score="mine")
    for inject, layer in ((0, 0), (2, 2)):
        with pytest.raises(
            ScheduleError,
            match=rf"score='mine' needs 'previous_hidden' of the layer before prune layer {layer}, but "
            rf"vision tokens enter at layer {inject}; prune at layer {inject + 1} or later",
        ):
            Schedule(inject=inject, prune={layer: 4}, score="mine")


def test_soft_ranks_are_refused_to_a_score_without_gradient() -> None:
    register_scorer("mine", differentiable=False)(key_norm)
    with pytest.raises(ScheduleError, match="score='mine' has no gradient for rank='soft'"):
        Schedule(prune={2: 4}, score="mine", selection="dtopk", rank="soft")


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    "schedule", ["inject=1,prune=2:4+3:2,exit=4", "prune=1:0.5+3:1,positions=compact"]
)
def test_programs_compute_a_score_as_the_plain_loop_does(
    name: str, schedule: str, llava: Any
) -> None:
    register_scorer(name)(SCORES[name])
    hidrop.compile(llava, f"{schedule},score={name}", backend="eager")
    found = hidrop.compare(llava, **batch(llava, ROWS, padding="left"), new_tokens=1)
    assert found.ok, str(found)


def test_what_a_score_is_given_is_what_it_asked_for(llava: Any) -> None:
    """The inputs of a layer, taken from transformers' own run, and the projections written out."""
    seen: dict[str, Tensor] = {}

    def score(
        hidden: Tensor,
        previous_hidden: Tensor,
        key: Tensor,
        value: Tensor,
        query: Tensor,
        columns: Tensor,
        is_vision: Tensor,
        query_columns: Tensor,
        scale: float,
    ) -> Tensor:
        if type(hidden) is Tensor:  # and not one of those without data, which only have shapes
            seen.update({n: v for n, v in locals().items() if isinstance(v, Tensor)})
            seen["scale"] = torch.tensor(scale)
        return columns.float()

    inputs = batch(llava, [[5, 6, IMAGE, 7, 8]])
    layer = 2
    hidrop.restore(llava) if hidrop.is_compiled(llava) else None
    states = llava.model(**inputs, output_hidden_states=True).hidden_states
    register_scorer("mine")(score)
    hidrop.compile(llava, f"prune={layer}:4,score=mine", backend="eager")
    with torch.no_grad():
        llava(**inputs)
        module = llava.get_decoder().layers[layer]
        normed = module.input_layernorm(states[layer])
        value = module.self_attn.v_proj(normed).unflatten(-1, (2, 8)).transpose(1, 2)
        plain_key = module.self_attn.k_proj(normed).unflatten(-1, (2, 8)).transpose(1, 2)
        plain_query = module.self_attn.q_proj(normed[:, -1:]).unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(seen["hidden"], states[layer])
    torch.testing.assert_close(seen["previous_hidden"], states[layer - 1])
    torch.testing.assert_close(seen["value"], value)
    # Rotation keeps norms, and is the identity at the first position.
    torch.testing.assert_close(seen["key"].norm(dim=-1), plain_key.norm(dim=-1))
    torch.testing.assert_close(seen["key"][:, :, 0], plain_key[:, :, 0])
    torch.testing.assert_close(seen["query"].norm(dim=-1), plain_query.norm(dim=-1))
    length = inputs["input_ids"].shape[1]
    assert seen["columns"].tolist() == [list(range(length))]
    assert seen["query_columns"].tolist() == [[length - 1]]
    assert seen["is_vision"].tolist() == [[False, False] + [True] * 9 + [False, False]]
    assert seen["scale"] == pytest.approx(8**-0.5)


def test_queries_of_ones_own_score() -> None:
    def first_text(prompt: Prompt) -> Tensor:
        return prompt.text.int().argmax(dim=1, keepdim=True)

    register_scorer("mine", queries=first_text)(largest_logit)
    model = tiny_llava("llama", num_layers=3)
    inputs = batch(model, ROWS, padding="left")
    found = prepare_batch(model, Schedule(prune={1: 2}, score="mine"), inputs)
    first = inputs["attention_mask"].argmax(dim=1)
    assert found.layout.query_columns.flatten().tolist() == first.tolist()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda key: key.norm(dim=-1), r"returned torch.float32 \[3, 2, 1009\] .*\[3, 1009\]"),
        (lambda columns: columns, r"returned torch.int64 \[3, 1009\]"),
        (lambda columns: None, r"returned None"),
        (
            lambda key, hidden: key @ hidden,
            r"failed on tensors of shapes .*'key': \[3, 2, 1009, 8\]",
        ),
    ],
)
def test_a_result_that_is_no_score_a_token_is_told_of(
    function: Any, message: str, llava: Any
) -> None:
    register_scorer("mine")(function)
    hidrop.compile(llava, "prune=2:4,score=mine", backend="eager")
    with pytest.raises(PassError, match=rf"score='mine': .*{message}"):
        llava(**batch(llava, [[5, IMAGE, 7]]))


# Through the package.


def kept(model: Any, inputs: Any) -> list[list[int]]:
    """Columns that the last layer sees, by the plain loop."""
    schedule = hidrop.inspect(model).schedule
    prepared = prepare_batch(model, schedule, inputs)
    rows = run_loop(model, prepared, Events.of(prepared.layout.plan))
    return [row.columns[-1].tolist() for row in rows]


def test_two_functions_under_one_name_share_no_program() -> None:
    model = tiny_llava("llama", num_layers=4)
    inputs = batch(model, ROWS)
    register_scorer("mine")(key_norm)
    logits = []
    for function in (key_norm, hidden_norm):
        register_scorer("mine", replace=True)(function)
        hidrop.compile(model, "prune=1:2,score=mine", backend="eager")
        logits.append(model(**inputs).logits)
        assert hidrop.compare(model, **inputs).ok
    assert not torch.equal(*logits)


@pytest.mark.parametrize("rank", ["hard", "soft"])
def test_training_under_a_scorer_equals_the_plain_loop(rank: str, llava: Any) -> None:
    register_scorer("mine")(key_norm)
    llava.train()
    inputs = batch(llava, ROWS)
    labels = random_labels(inputs)
    learned = "" if rank == "hard" else ",selection=dtopk,rank=soft"
    hidrop.compile(llava, f"inject=1,prune=2:4,exit=4,score=mine{learned}", backend="eager")
    found = hidrop.compare(llava, **inputs, labels=labels)
    llava.eval()
    assert found.ok, str(found)


def test_a_hard_selection_gives_scores_no_gradient() -> None:
    model = tiny_llava("llama", num_layers=3)
    noted: list[bool] = []

    def score(hidden: Tensor) -> Tensor:
        return hidden.float().sum(dim=-1)

    register_scorer("mine")(score)
    hidrop.compile(model, "prune=1:4,score=mine", backend="eager")
    from hidrop_fx.ops import tokens

    original = tokens.surviving_columns
    try:
        tokens.surviving_columns = lambda scores, *rest: (  # type: ignore[assignment]
            noted.append(scores.requires_grad) or original(scores, *rest)
        )
        inputs = batch(model, ROWS)
        model.train()(**inputs, labels=random_labels(inputs)).loss.backward()
    finally:
        tokens.surviving_columns = original
    assert noted
    assert not any(noted)


def test_a_scorer_that_draws_cannot_be_compared(llava: Any) -> None:
    register_scorer("mine", deterministic=False)(late_columns)
    hidrop.compile(llava, "prune=2:4,score=mine", backend="eager")
    with pytest.raises(hidrop.HidropError, match="score='mine' draws other tokens in every run"):
        hidrop.compare(llava, **batch(llava, ROWS))


def test_a_saved_schedule_asks_for_its_scorer(tmp_path: Path, llava: Any) -> None:
    register_scorer("mine")(key_norm)
    hidrop.compile(llava, "prune=2:4,score=mine", backend="eager")
    hidrop.save(llava, tmp_path)
    model = tiny_llava("llama", num_layers=5, kv_heads=2)
    hidrop.load(model, tmp_path, backend="eager")
    assert hidrop.inspect(model).schedule.scorer.function is key_norm
    SCORERS.remove("mine")
    with pytest.raises(
        ScheduleError, match=r"hidrop\.json.*unknown score='mine'.*register_scorer first"
    ):
        hidrop.load(tiny_llava("llama", num_layers=5, kv_heads=2), tmp_path)


def test_calibration_measures_the_scorer_of_the_schedule() -> None:
    register_scorer("mine")(key_norm)
    model = tiny_llava("llama", num_layers=4)
    samples = [batch(model, ROWS[:2]), batch(model, ROWS[:2])]
    found = hidrop.calibrate(model, samples, progress=False)
    schedule = found.refine("prune=1:0.5+2:2,score=mine", evaluations=2)
    assert schedule.score == "mine"
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_flops_count_what_the_needs_of_a_score_cost() -> None:
    sizes: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vision_tokens": 9,
        "text_tokens": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    for name, function in SCORES.items():
        register_scorer(name)(function)
    register_scorer("priced", cost=lambda tokens, dropped, model: 1000 * tokens + dropped)(key_norm)

    def flops(name: str) -> int:
        return hidrop.plan(Schedule(prune={2: 3}, score=name), **sizes).flops

    free = flops("late_columns")
    tokens, dropped, queries, keys = 15, 6, 4 * 16, 2 * 16
    assert flops("hidden_norm") == flops("change") == free
    assert flops("key_norm") - free == 2 * dropped * 64 * keys
    assert flops("value_norm") - free == 2 * tokens * 64 * keys
    attention = 2 * (dropped * 64 * keys + tokens * queries)
    assert flops("largest_logit") - free == flops("last_token") - free == attention
    assert flops("random") - free == attention
    assert flops("priced") - free == 2 * (1000 * tokens + dropped)


def test_a_scorer_is_a_value() -> None:
    scorer = Scorer(name="mine", score=Deferred("operator:neg", ("columns",)))
    assert scorer == Scorer(name="mine", score=Deferred("operator:neg", ("columns",)))
    assert hash(scorer) == hash(Scorer(name="mine", score=Deferred("operator:neg", ("columns",))))
    assert scorer.function(3) == -3
