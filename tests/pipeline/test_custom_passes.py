"""`compile(..., passes=[...])`: a user's passes run where they should, are told of, and fail with their name.

Over 400 lines: the passes at the top serve all tests.
"""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import InputError
from hidrop_fx.inspection.report.programs import programs_of
from hidrop_fx.ops import tokens
from hidrop_fx.pipeline.custom_passes import names_of, sources_of
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime import artifacts as persistence
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.models import IMAGE, PRUNED, batch, random_labels, tiny_llava
from tests.support.runtimes import runtime_in

ROWS: Any = [[5, 6, IMAGE, 7], [8, 9, IMAGE, 4, IMAGE, 3, 3]]

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def spread_scores(columns: Tensor) -> Tensor:
    return (columns.float() * 0.6180339887).frac()


def by_spread(program: Program, plan: Plan) -> PassResult:
    chosen = [n for n in program.graph.nodes if n.target is tokens.surviving_columns]
    for node in chosen:
        node.replace_input_with(
            node.args[0], program.call(spread_scores, node.args[1], before=node)
        )
    return PassResult(matched=len(chosen))


def doubled(states: Tensor) -> Tensor:
    return states * 2


def double_attention(program: Program, plan: Plan) -> PassResult:
    for region in program.regions:
        user = next(iter(region.attention.users))
        twice = program.call(doubled, region.attention, before=user)
        user.replace_input_with(region.attention, twice)
    return PassResult(matched=len(program.regions))


def norm_of(states: Tensor) -> Tensor:
    return states.float().norm(dim=-1)


def watch_norms(program: Program, plan: Plan) -> PassResult:
    end = program.graph.output_node()
    norms = {
        f"norm_{r.layer}": program.call(norm_of, r.live_out, before=end) for r in program.regions
    }
    program.returns({**program.outputs, **norms})
    return PassResult(matched=len(norms), note="norms")


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava()


def compiled_with(llava: Any, *passes: Any, schedule: str = PRUNED, **options: Any) -> Any:
    llava.eval()
    return hidrop.compile(llava, schedule, **{"backend": "eager", **options}, passes=passes)


def names(model: Any) -> dict[str, list[str]]:
    runtime = runtime_in(model)
    return {k: [s.name for s in e.program.history] for k, e in programs_of(runtime).items()}


def test_custom_pass_runs_in_every_program_at_its_place(llava: Any) -> None:
    model = compiled_with(llava, by_spread)
    inputs = batch(model, ROWS)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.train()(**inputs, labels=random_labels(inputs)).loss.backward()
    model.zero_grad(set_to_none=True)
    found = {kind.split("-")[0]: stages for kind, stages in names(model).items()}
    assert set(found) == {"prefill", "decode", "train"}
    for kind in ("prefill", "train"):
        place = found[kind].index("by_spread")
        assert found[kind][place - 1 : place + 2] == ["positions", "by_spread", "attention"]
    assert found["decode"] == ["captured", "split_streams", "by_spread", "kv_cache", "head"]


def test_custom_scorer_chooses_the_survivors(llava: Any) -> None:
    model = compiled_with(llava, by_spread)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    output = model(**inputs)
    # Schedule: 9 tokens at columns 2 to 10, 6 of them from layer 1 on, then 3.
    scores = spread_scores(torch.arange(2, 11))
    first = scores.topk(6).indices
    best = first[scores[first].topk(3).indices]
    expected = {0, 1, 11, *(best + 2).tolist()}
    # Layer 3 is behind the exit, so what prefill's cache holds of layer 2 tells.
    cached = output.past_key_values.log.columns["prune_2"][0].tolist()
    assert set(cached) == expected


@pytest.mark.parametrize("lowering", ["bodies", "whole"])
def test_custom_pass_inside_layers_changes_decode_as_well(llava: Any, lowering: str) -> None:
    """Against the same change of the model's own weights."""
    inputs = batch(llava, ROWS)
    model = compiled_with(llava, double_attention, lowering=lowering)
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    hidrop.restore(model)
    other = tiny_llava()
    with torch.no_grad():
        for layer in other.get_decoder().layers:
            layer.self_attn.o_proj.weight *= 2
    other = hidrop.compile(other, PRUNED, backend="eager")
    expected = other.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert torch.equal(found, expected)
    plain = compiled_with(llava)
    unchanged = plain.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert not torch.equal(found, unchanged)


def test_nodes_inserted_within_a_layer_join_its_region(llava: Any) -> None:
    model = compiled_with(llava, double_attention)
    model(**batch(model, ROWS))
    runtime = runtime_in(model)
    (executable,) = programs_of(runtime).values()
    assert sum(len(b.used_by) for b in executable.bodies.values() if "layer" in b.name) == 4
    for region in executable.program.regions:
        assert any(node.target is doubled for node in region.nodes)


def test_pass_outputs_come_with_the_output(llava: Any) -> None:
    model = compiled_with(llava, watch_norms)
    inputs = batch(model, ROWS)
    output = model(**inputs)
    text = 5
    assert output.pass_outputs["norm_0"].shape == (2, text)
    assert output.pass_outputs["norm_1"].shape == (2, text + 12)
    assert output.pass_outputs["norm_3"].shape == (2, text)
    # Only the wanted rows are normalised, and the pass still sees all of the last layer.
    last = model(**inputs, logits_to_keep=1)
    assert last.logits.shape[1] == 1
    assert torch.equal(last.pass_outputs["norm_3"], output.pass_outputs["norm_3"])
    step = model(input_ids=torch.tensor([[5], [6]]), past_key_values=output.past_key_values)
    assert step.pass_outputs["norm_2"].shape == (2, 1)
    train = model.train()(**inputs, labels=random_labels(inputs))
    assert train.pass_outputs["norm_3"].shape == train.logits.shape[:2]


def test_output_without_custom_passes_has_no_pass_outputs(llava: Any) -> None:
    model = compiled_with(llava)
    assert not hasattr(model(**batch(model, ROWS)), "pass_outputs")


def test_custom_pass_is_shown_by_every_report(llava: Any, tmp_path: Path) -> None:
    model = compiled_with(llava, by_spread, watch_norms)
    inputs = batch(model, ROWS)
    model(**inputs)
    report = hidrop.inspect(model)
    assert report.passes == ("by_spread", "watch_norms")
    assert "passes    by_spread, watch_norms" in str(report)
    assert any("by_spread" in layer.inserted for layer in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["passes"] == ["by_spread", "watch_norms"]
    explained = hidrop.explain(model, **inputs)
    assert "passes    by_spread, watch_norms" in str(explained)
    folder = hidrop.dump(model, tmp_path)
    assert "watch_norms" in (folder / "README.txt").read_text()
    (stage,) = folder.glob("prefill*/06_by_spread.py")
    assert "spread_scores" in stage.read_text()
    assert "by_spread" in (folder / "report.html").read_text()


def count_up(program: Program, plan: Plan, *, by: int) -> PassResult:
    end = program.graph.output_node()
    more = program.call(torch.add, program.outputs["hidden"], by, before=end)
    program.returns({**program.outputs, "more": more})
    return PassResult(matched=1)


def test_a_partial_has_the_name_of_its_function(llava: Any) -> None:
    model = compiled_with(llava, functools.partial(count_up, by=3))
    output = model(**batch(model, ROWS))
    (stages,) = names(model).values()
    assert "count_up" in stages
    assert output.pass_outputs["more"].isfinite().all()
    three, four = (functools.partial(count_up, by=number) for number in (3, 4))
    assert sources_of([three]) != sources_of([four])
    assert names_of([three, by_spread]) == "count_up, by_spread"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (by_spread, r"passes=<function by_spread.*give a list"),
        ("prune", "passes='prune'; give a list"),
        (3, "passes=3; give a list"),
        (["prune"], "passes holds 'prune', a str; a pass is a function"),
        ([functools.partial(lambda program, plan: None)], "has no name to call it by"),
        ([by_spread, functools.partial(by_spread)], "a second 'by_spread'.* set its __name__"),
        ([lambda program, plan: PassResult(matched=0)], "has no name to call it by"),
        ([by_spread, by_spread], "a second 'by_spread'"),
    ],
)
def test_a_custom_pass_that_is_no_pass_is_refused_and_the_model_unchanged(
    given: Any, message: str, llava: Any
) -> None:
    model = compiled_with(llava, watch_norms)
    before = runtime_of(model)
    with pytest.raises(hidrop.PassError, match=message):
        hidrop.compile(model, "exit=2", backend="eager", passes=given)
    assert runtime_of(model) is before


def test_a_custom_pass_with_a_builtin_name_is_refused(llava: Any) -> None:
    def prune(program: Program, plan: Plan) -> PassResult:
        return PassResult(matched=0)

    with pytest.raises(hidrop.PassError, match="a second 'prune'"):
        compiled_with(llava, prune)


def returns_nothing(program: Program, plan: Plan) -> Any:
    return None


def breaks_a_length(program: Program, plan: Plan) -> PassResult:
    region = program.regions[2]
    kept = program.call(shorter, region.hidden, before=region.nodes[0])
    region.read(region.hidden, kept)
    region.hidden = kept
    return PassResult(matched=1)


def shorter(states: Tensor) -> Tensor:
    return states[:, :2]


def wants_an_input(program: Program, plan: Plan) -> PassResult:
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder("temperature")
    node.meta["val"] = last.meta["val"]
    return PassResult(matched=1)


def returns_too_little(program: Program, plan: Plan) -> PassResult:
    program.returns({"states": program.outputs["hidden"]})
    return PassResult(matched=1)


def takes_a_name(program: Program, plan: Plan) -> PassResult:
    program.returns({**program.outputs, "columns_text": program.outputs["hidden"]})
    return PassResult(matched=1)


def does_not_fit(program: Program, plan: Plan) -> PassResult:
    node = next(n for n in program.regions[1].nodes if "linear" in n.name)
    node.args = (node.args[1], node.args[0])
    return PassResult(matched=1)


def is_upside_down(program: Program, plan: Plan) -> PassResult:
    region = program.regions[1]
    region.attention.append(region.nodes[0])
    return PassResult(matched=1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (returns_nothing, "the pass returns_nothing returned None, a NoneType; return hidrop_fx.P"),
        (breaks_a_length, r"after the pass breaks_a_length: layers.2 should see the tokens"),
        (wants_an_input, "the pass wants_an_input adds the input 'temperature', which no call"),
        (returns_too_little, 'after the pass returns_too_little the program no longer returns "h'),
        (takes_a_name, "the pass takes_a_name returns 'columns_text', a name that is taken"),
        (does_not_fit, "does not fit together after the pass does_not_fit"),
        (is_upside_down, "the graph is malformed after is_upside_down"),
    ],
)
def test_a_broken_custom_pass_is_named_with_its_fault(
    broken: Any, message: str, llava: Any
) -> None:
    model = compiled_with(llava, broken)
    inputs = batch(model, ROWS)
    for _ in range(2):  # nothing of the failed program is left
        with pytest.raises(hidrop.PassError, match=message):
            model(**inputs)
    hidrop.restore(model)
    assert model(**inputs).logits.isfinite().all()


def times(states: Tensor, factor: Tensor) -> Tensor:
    return states * factor


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_custom_pass_declares_an_input_that_each_call_fills(
    cuda_graphs: bool, llava: Any
) -> None:
    factor = [1.0]

    def scaled(program: Program, plan: Plan) -> PassResult:
        spec = InputSpec("factor", (), torch.float32, lambda call: torch.tensor(factor[0]))
        end = program.graph.output_node()
        states = program.outputs["hidden"]
        product = program.call(times, states, program.add_input(spec), before=end)
        program.returns({**program.outputs, "scaled": product})
        return PassResult(matched=1)

    model = compiled_with(llava, scaled, cuda_graphs=cuda_graphs)
    inputs = batch(model, ROWS)
    with torch.no_grad():
        once = model(**inputs).pass_outputs["scaled"].clone()
        factor[0] = 2.0
        twice = model(**inputs).pass_outputs["scaled"]
    assert once.abs().max() > 0
    assert torch.equal(twice, 2 * once)


def test_a_pass_error_of_a_custom_pass_is_raised_as_it_is(llava: Any) -> None:
    def fails(program: Program, plan: Plan) -> PassResult:
        raise hidrop.PassError("fails: nothing to rewrite")

    with pytest.raises(hidrop.PassError, match="fails: nothing to rewrite"):
        compiled_with(llava, fails)(**batch(llava, ROWS))


def test_compiled_code_of_another_pass_is_not_loaded(tmp_path: Path) -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "exit=1", passes=[by_spread])
    runtime = runtime_in(model)
    header = {
        "format": persistence.FORMAT,
        **persistence._identity(runtime),
        **persistence._environment(runtime),
    }
    file = tmp_path / "code.hidrop"
    for name, other in (("names", [watch_norms]), ("none", [])):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("header.json", json.dumps(header))
            archive.writestr("artifacts", name)
        hidrop.compile(model, "exit=1", passes=other)
        with pytest.raises(hidrop.HidropError, match=r"saved with passes 'by_spread', here it is"):
            hidrop.load_compiled(model, file)
    hidrop.compile(model, "exit=1", passes=[_renamed(double_attention, "by_spread")])
    assert hidrop.load_compiled(model, file) is False


def _renamed(rewrite: Any, name: str) -> Any:
    def wrapped(program: Program, plan: Plan) -> PassResult:
        result: PassResult = rewrite(program, plan)
        return result

    wrapped.__name__ = name
    return wrapped


def test_passes_typed_in_are_told_apart_by_source() -> None:
    spaces: list[dict[str, Any]] = [{}, {}]
    for number, space in enumerate(spaces):
        exec(f"def typed(program, plan):\n    return plan.{'ab'[number]}", space)
    first, second = (sources_of([space["typed"]]) for space in spaces)
    assert first != second
    assert sources_of([]) == "none"


# Inputs of a custom pass.


def scaled(factor: Any, *, dims: tuple[str | int, ...] = ()) -> Any:
    """A pass that multiplies the final hidden states by an input that `factor(call)` fills."""

    def scale(program: Program, plan: Plan) -> PassResult:
        given = program.add_input(InputSpec("factor", dims, torch.float32, factor))
        hidden, end = program.outputs["hidden"], program.graph.output_node()
        total = program.call(torch.sum, given, before=end)
        new = program.call(torch.mul, hidden, total, before=end)
        program.returns({**program.outputs, "scaled": new})
        return PassResult(matched=1)

    return scale


def test_a_custom_input_may_read_the_layout_and_the_arguments_of_the_call(llava: Any) -> None:
    seen = []

    def factor(call: Any) -> Tensor:
        seen.append((sorted(call.kwargs), getattr(call, "layout", None)))
        return torch.tensor(1.0)

    hidrop.compile(llava, "prune=2:4", backend="eager", passes=[scaled(factor)])
    inputs = batch(llava, [[5, IMAGE, 7]])
    llava.generate(**inputs, max_new_tokens=2, do_sample=False)
    (given, layout), (_, nothing) = seen
    assert {"input_ids", "pixel_values"} <= set(given) or "mm_encoder_outputs" in given
    assert layout.lengths["text"] == 2
    assert nothing is None  # a decode step has no layout


@pytest.mark.parametrize(
    ("factor", "dims", "message"),
    [
        (
            lambda call: torch.ones(2),
            (),
            r"declared as torch.float32 \[\], but .* torch.float32 \[2\]",
        ),
        (lambda call: torch.ones(3), (2,), r"\[2\], but its fill returned torch.float32 \[3\]"),
        (lambda call: torch.ones((), dtype=torch.int64), (), r"returned torch.int64 \[\]"),
        (lambda call: torch.ones(2), ("batch",), r"\[batch\], but .* torch.float32 \[2\]"),
        (lambda call: 1.0, (), r"returned float"),
        (lambda call: call.nothing, (), r"could not be filled: AttributeError: .*nothing"),
    ],
)
def test_a_custom_input_that_is_filled_wrongly_is_named(
    factor: Any, dims: Any, message: str, llava: Any
) -> None:
    hidrop.compile(llava, "prune=2:4", backend="eager", passes=[scaled(factor, dims=dims)])
    with pytest.raises(InputError, match=rf"^the input 'factor' of the pass scale .*{message}"):
        llava(**batch(llava, [[5, IMAGE, 7]]))


def test_two_inputs_of_one_name_are_refused(llava: Any) -> None:
    def again(program: Program, plan: Plan) -> PassResult:
        program.add_input(InputSpec("factor", (), torch.float32, lambda call: torch.tensor(9.0)))
        return PassResult(matched=1)

    first = scaled(lambda call: torch.tensor(2.0))
    hidrop.compile(llava, "prune=2:4", backend="eager", passes=[first, again])
    with pytest.raises(hidrop.PassError, match="has an input 'factor' already; choose another"):
        llava(**batch(llava, [[5, IMAGE, 7]]))
