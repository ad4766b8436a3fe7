"""Layer bodies: how many there are, that all lowerings agree, how often they compile, and what happens when that fails."""

from __future__ import annotations

import copy
import dataclasses
import logging
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import hidrop_fx as hidrop
from hidrop_fx import Plan, Schedule
from hidrop_fx.lowering.body import Body
from hidrop_fx.lowering.checkpointing import Recomputable
from hidrop_fx.lowering.compile_log import CompileEntry, CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.outline import lower
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.planning.layout import lay_out
from hidrop_fx.program.program import Program
from hidrop_fx.program.variant import Kind
from hidrop_fx.runtime.fingerprint import DecoderSnapshot
from hidrop_fx.runtime.runtime import Runtime
from tests.support import counter
from tests.support.captured import CapturedModel, capture_of
from tests.support.models import FIRST_WORD, IMAGE, IMAGE_TOKEN, Row, batch, tiny_llava
from tests.support.programs import prompt_inputs
from tests.support.runtimes import runtime_in

LAYERS, WIDTH = 3, 32
FILTERED = "inject=1,prune=1:4,exit=2"
"""Plain layers 0 and 2, and a filter layer between them."""


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled here outlives the module, nor does it meet what was compiled before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Structure.


@pytest.fixture(scope="module")
def llama() -> CapturedModel:
    return CapturedModel(num_layers=LAYERS)


def lowered(
    program: Program, lowering: str = "bodies", shared: dict[str, Body] | None = None
) -> Executable:
    return lower(
        program,
        backend="eager",
        lowering=lowering,
        log=CompileLog(),
        shared={} if shared is None else shared,
    )


def users(executable: Executable) -> dict[str, list[str]]:
    return {body.name: body.used_by for body in executable.bodies.values()}


def body_calls(executable: Executable) -> list[fx.Node]:
    return [n for n in executable.top.graph.nodes if isinstance(n.target, Body | Recomputable)]


PLAIN, FILTER = Schedule(), Schedule.parse(FILTERED)
TWO_FILTERS = Schedule(prune={1: 5, 2: 2})


def test_all_layers_of_the_identity_share_one_body(llama: CapturedModel) -> None:
    assert users(lowered(llama.built("train", PLAIN))) == {
        "train layer body 1": ["train layer_0", "train layer_1", "train layer_2"]
    }


def test_a_filter_layer_adds_its_own_body_and_a_score(llama: CapturedModel) -> None:
    assert users(lowered(llama.built("train", FILTER))) == {
        "train layer body 1": ["train layer_0", "train layer_2"],
        "train score body 1": ["train score_1"],
        "train layer body 2": ["train layer_1"],
    }


def test_filter_layers_share_their_bodies_too(llama: CapturedModel) -> None:
    assert users(lowered(llama.built("train", TWO_FILTERS))) == {
        "train layer body 1": ["train layer_0"],
        "train score body 1": ["train score_1", "train score_2"],
        "train layer body 2": ["train layer_1", "train layer_2"],
    }


def test_programs_of_one_kind_share_bodies(llama: CapturedModel) -> None:
    shared: dict[str, Body] = {}
    first = lowered(llama.built("prefill", FILTER), shared=shared)
    bodies = dict(shared)
    second = lowered(llama.built("prefill", FILTER, "chosen"), shared=shared)
    assert shared == bodies
    assert {b.name: b for b in second.bodies.values()} == {b.name: b for b in first.bodies.values()}
    # Training hands no keys and values out of a layer, and compiles of a prune the scores alone.
    lowered(llama.built("train", FILTER), shared=shared)
    assert [b.name for b in shared.values() if b not in bodies.values()] == [
        "train layer body 1", "train score body 1", "train layer body 2",
    ]  # fmt: skip


def test_layers_that_differ_in_a_constant_do_not_share() -> None:
    model: Any = tiny_llava(num_layers=LAYERS)
    model.get_decoder().layers[1].input_layernorm.variance_epsilon = 1e-2
    captured = capture_of(model)
    program = build_program(captured, Plan.of(PLAIN, depth_of(model)), "train")
    assert list(users(lowered(program)).values()) == [
        ["train layer_0", "train layer_2"], ["train layer_1"],
    ]  # fmt: skip


def test_each_call_of_a_body_gets_its_layers_own_parameters(llama: CapturedModel) -> None:
    executable = lowered(llama.built("train", FILTER))
    found = body_calls(executable)
    assert [n.meta["hidrop"] for n in found] == ["layer_0", "score_1", "layer_1", "layer_2"]
    for call in found:
        layer = call.meta["hidrop"][-1]
        parameters = [str(n.target) for n in call.all_input_nodes if n.op == "get_attr"]
        assert parameters
        assert all(name.startswith(f"layers.{layer}.") for name in parameters)


def test_bodies_take_values_first_and_hold_no_tensor(llama: CapturedModel) -> None:
    for body in lowered(llama.built("train", FILTER)).bodies.values():
        names = [n.name for n in body.module.graph.nodes if n.op == "placeholder"]
        split = [name.startswith("parameter_") for name in names]
        assert split == sorted(split)
        assert not any(n.op == "get_attr" for n in body.module.graph.nodes)
        assert not list(body.module.parameters())


def test_the_model_keeps_its_parameters_in_the_top_graph(llama: CapturedModel) -> None:
    own = dict(llama.model.get_decoder().named_parameters())
    top = lowered(llama.built("train", FILTER)).top
    assert all(parameter is own[name] for name, parameter in top.named_parameters())


@pytest.mark.parametrize(
    ("schedule", "glue"), [(PLAIN, 35), (FILTER, 85)], ids=["identity", "filter"]
)
@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_the_top_graph_is_short(
    llama: CapturedModel, kind: Kind, schedule: Schedule, glue: int
) -> None:
    program = llama.built(kind, schedule)
    executable = lowered(program)
    operations = [n for n in executable.top.graph.nodes if n.op == "call_function"]
    # A layer is one call, and in prefill two writes and what picks keys and values out.
    assert len(operations) <= glue + LAYERS * (6 if kind == "prefill" else 1)
    assert len(body_calls(executable)) <= LAYERS + 1
    assert not any("linear" in str(n.target) for n in operations)


def test_a_whole_program_is_one_call(llama: CapturedModel) -> None:
    executable = lowered(llama.built("train", FILTER), "whole")
    (call,) = body_calls(executable)
    picked = [n for n in executable.top.graph.nodes if n.op == "call_function" and n is not call]
    assert {n.target for n in picked} == {operator.getitem}
    assert users(executable) == {"train program": ["train"]}


# All lowerings agree.


def tensors_of(schedule: Schedule, kind: Kind, program: Program) -> dict[str, Tensor]:
    """Inputs for two rows of 9 and 7 tokens, 4 of them vision; random ones in decode."""
    generator = torch.Generator().manual_seed(0)
    if kind == "decode":
        sizes = {
            n: 3 + int(n.split("_")[1]) for n in program.inputs if n.startswith(("keys", "values"))
        }
        tensors = {n: torch.randn(2, 2, s, 8, generator=generator) for n, s in sizes.items()}
        for segment in program.segments:
            layers = [k for k in range(LAYERS) if program.segment_of(k) is segment]
            tensors[f"slots_{segment.name}"] = torch.tensor([2 + max(layers, default=0)])
            for k in layers:
                for name in ("keys", "values"):
                    tensors[f"{name}_{k}"] = torch.randn(
                        2, 2, 3 + max(layers), 8, generator=generator
                    )
        tensors["inputs_embeds"] = torch.randn(2, 1, WIDTH, generator=generator)
        tensors["position_ids"] = torch.tensor([[9], [7]])
        return tensors
    rows = ["ttvvvvttt", "..tvvvvtt"]
    layout = lay_out(
        Plan.of(schedule, LAYERS),
        valid=torch.tensor([[c != "." for c in row] for row in rows]),
        placeholder=torch.tensor([[c == "v" for c in row] for row in rows]),
        position_ids=torch.arange(9).repeat(2, 1),
        images=[1, 1],
    )
    tensors = prompt_inputs(layout, torch.randn(2, 10, WIDTH, generator=generator))
    for k in range(LAYERS):
        length = layout.lengths[program.segment_of(k).name]
        tensors |= {f"{n}_{k}": torch.zeros(2, 2, length, 8) for n in ("keys", "values")}
    return tensors


@pytest.mark.parametrize("schedule", [PLAIN, FILTER], ids=["identity", "filter"])
@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_bodies_equal_whole_equal_the_program_as_it_is(
    llama: CapturedModel, kind: Kind, schedule: Schedule
) -> None:
    program = llama.built(kind, schedule)
    tensors = tensors_of(schedule, kind, program)

    def run(call: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
        copies = {name: value.clone() for name, value in tensors.items()}
        with torch.no_grad():
            outputs = call(copies)
        buffers = {n: v for n, v in copies.items() if n.startswith(("keys", "values"))}
        return {**outputs, **(buffers if kind != "train" else {})}

    expected = run(lambda named: program.module(*[named[name] for name in program.inputs]))
    for lowering in ("bodies", "whole"):
        executable = lowered(program, lowering)
        found = run(executable)
        assert executable.calls == 1
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (lowering, name)


def test_a_trained_step_is_the_same_through_bodies(llama: CapturedModel) -> None:
    program = llama.built("train", FILTER)
    tensors = tensors_of(FILTER, "train", program)
    gradients = []
    for lowering in ("bodies", "whole"):
        llama.model.zero_grad()
        lowered(program, lowering)(tensors)["hidden"].square().sum().backward()
        decoder: nn.Module = llama.model.get_decoder()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    llama.model.zero_grad()
    assert len(gradients[0]) == 9 * LAYERS + 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


# How often it compiles.


def compiled_llama(
    schedule: str = FILTERED, backend: str = "aot_eager", **options: Any
) -> tuple[Any, Runtime]:
    model = hidrop.compile(
        tiny_llava(num_layers=LAYERS, kv_heads=2), schedule, backend=backend, **options
    )
    runtime = runtime_in(model)
    return model, runtime


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same model on the eager backend."""
    return compiled_llama(backend="eager")[0]


def mixed_calls(model: Any, count: int) -> list[dict[str, Tensor]]:
    """Batches of 1 to 4 rows, 0 to 3 images and 1 to 12 words a row, padded on either side."""
    choose = random.Random(7)

    def words() -> list[int | str]:
        return [choose.randrange(FIRST_WORD, IMAGE_TOKEN) for _ in range(choose.randint(1, 4))]

    def row() -> Row:
        return [item for _ in range(choose.randint(0, 3)) for item in [*words(), IMAGE]] + words()

    return [
        batch(
            model,
            [row() for _ in range(choose.randint(1, 4))],
            padding=choose.choice(["left", "right"]),
        )
        for _ in range(count)
    ]


def answer(model: Any, inputs: dict[str, Tensor], new_tokens: int = 3) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    found: list[list[int]] = out[:, length:].tolist()
    return found


def test_mixed_calls_compile_no_more_than_announced(reference: Any) -> None:
    model, _ = compiled_llama()
    calls = mixed_calls(model, 50)
    assert {len(c["input_ids"]) for c in calls} == {1, 2, 3, 4}
    with counter.expect() as made:
        for inputs in calls:
            assert answer(model, inputs) == answer(reference, inputs)
    found = counter.names(made.compiled)
    # One variant for a batch of 1 and one for all others; decode is two programs, with masks and without.
    assert found == {
        "decode program": found.get("decode program"),
        "prefill layer body 1": 2,
        "prefill layer body 2": 2,
        "prefill prune body 1": 2,
    }
    assert 2 <= found["decode program"] <= 4
    with counter.expect(compiled=0):
        for inputs in calls:
            answer(model, inputs)


def test_with_gradients_it_compiles_once_more_and_not_for_every_length(reference: Any) -> None:
    model, _ = compiled_llama()
    prompts = [[5, *range(10, 10 + extra), IMAGE, 7, 8] for extra in range(6)]
    answer(model, batch(model, [prompts[0]]), 2)
    bodies = {"prefill layer body 1": 1, "prefill layer body 2": 1, "prefill prune body 1": 1}
    with counter.expect(compiled=bodies):
        for prompt in prompts:
            # As `model(**inputs)` is called: with gradients, and with a cache.
            inputs = batch(model, [prompt])
            expected = reference(**inputs, logits_to_keep=1).logits
            torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected)


def test_training_after_generating_compiles_once_for_all_lengths(reference: Any) -> None:
    model, _ = compiled_llama()
    prompts = [[5, *range(10, 10 + extra), IMAGE, 7, 8] for extra in range(6)]
    answer(model, batch(model, [prompts[0]]), 2)
    bodies = {"train layer body 1": 1, "train layer body 2": 1, "train score body 1": 1}
    with counter.expect(compiled=bodies):
        for prompt in prompts:
            inputs = batch(model, [prompt])
            inputs["labels"] = torch.where(
                inputs["input_ids"] == IMAGE_TOKEN, -100, inputs["input_ids"]
            )
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            torch.testing.assert_close(loss, reference(**inputs, use_cache=False).loss)


def test_compilations_are_logged_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    model, runtime = compiled_llama()
    heard: list[CompileEntry] = []
    runtime.programs.log.listener = heard.append
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        answer(model, batch(model, [[5, IMAGE, 7]]), 2)
    # Twice each: when it starts, and when it is done.
    started, done = heard[::2], heard[1::2]
    assert [(e.name, e.shapes) for e in started] == [(e.name, e.shapes) for e in done]
    assert all(e.seconds is None for e in started)
    assert done == runtime.programs.log.entries
    assert Counter(entry.name for entry in done) == {
        "decode program": 1,
        "prefill layer body 1": 1,
        "prefill layer body 2": 1,
        "prefill prune body 1": 1,
    }
    assert runtime.programs.log.seconds == pytest.approx(sum(e.seconds or 0.0 for e in done))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiled ")]
    assert len(lines) == len(done)
    assert lines[0].startswith(f"compiled {done[0].name} [1, *, {WIDTH}] in ")


# Calls that need no look-up.


def without_lookup(body: Body, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the calls that still go through torch.compile."""
    lengths: list[int] = []
    run = body._run

    def counted(*args: Tensor) -> Any:
        lengths.append(args[0].shape[1])
        return run(*args)

    monkeypatch.setattr(body, "_run", counted)
    return lengths


def a_body(compiler: str = "aot_eager", **options: Any) -> tuple[Body, CompileLog]:
    graph = fx.Graph()
    states, weight = graph.placeholder("states"), graph.placeholder("weight")
    states.meta["symbolic_dims"] = (1,)
    product = graph.call_function(torch.matmul, (states, weight))
    graph.output((graph.call_function(torch.relu, (product,)), product))
    log = CompileLog()
    return Body("body", fx.GraphModule({}, graph), compiler, log, **options), log


def test_layers_of_one_length_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body, log = a_body(bypass_guards=True)
    lengths = without_lookup(body, monkeypatch)
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    with torch.no_grad():
        for length in (5, 6, 5):
            for weight in weights:
                states = torch.randn(2, length, 8)
                product = states @ weight
                found = body(states, weight)
                assert torch.equal(found[0], product.relu())
                assert torch.equal(found[1], product)
    assert lengths == [5, 6]
    assert len(log.entries) == 1


def test_calls_of_another_kind_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body, _ = a_body(bypass_guards=True)
    states, weight = torch.randn(2, 5, 8), nn.Parameter(torch.randn(8, 8))
    square = torch.randn(2, 8, 8)
    with torch.no_grad():
        body(states, weight)
        body(square, weight)
    lengths = without_lookup(body, monkeypatch)
    strided = torch.randn(5, 2, 8).transpose(0, 1)
    with torch.no_grad():
        assert torch.equal(body(strided, weight)[1], strided @ weight)
        assert torch.equal(body(states, weight.detach())[1], states @ weight)
        assert body(states.double(), weight.double())[1].dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert body(states, weight)[1].dtype == torch.bfloat16
        with torch.device("cpu"):
            body(states, weight)
    assert lengths == [5] * 5
    body(states, weight)[1].sum().backward()
    assert weight.grad is not None
    assert lengths == [5] * 6
    with torch.inference_mode():
        body(states.clone(), weight)
    assert lengths == [5] * 7


@pytest.mark.parametrize("twice_first", [False, True])
def test_one_tensor_in_two_places_is_looked_up(
    twice_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is compiled for it serves no call with two, nor the other way round."""
    body, _ = a_body(bypass_guards=True)
    one, other = torch.randn(8, 8), torch.randn(8, 8)
    second = (other, one) if twice_first else (one, other)
    with torch.no_grad():
        body(one, second[1])
        lengths = without_lookup(body, monkeypatch)
        assert torch.equal(body(one, second[0])[1], one @ second[0])
    assert lengths == [8]


def test_what_may_be_remembered_differs_by_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    states, slots = graph.placeholder("states"), graph.placeholder("slots")
    states.meta["symbolic_dims"] = (1,)
    slots.meta["val"] = torch.empty(100_005, dtype=torch.int64, device="meta")
    graph.output(graph.call_function(torch.index_select, (states, 1, slots)))
    body = Body("body", fx.GraphModule({}, graph), "aot_eager", CompileLog(), bypass_guards=True)
    states = torch.randn(2, 9)
    with torch.no_grad():
        for length in (4, 5):
            body(states, torch.arange(length))
        lengths = without_lookup(body, monkeypatch)
        for length in (4, 5, 4):
            assert torch.equal(body(states, torch.arange(length)), states[:, :length])
    assert lengths == []


def test_a_whole_prefill_is_looked_up_once_and_writes_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"schedule": "inject=1,prune=2:3", "lowering": "whole"}
    model = hidrop.compile(tiny_llava(), backend="aot_eager", **options)
    expected = hidrop.compile(tiny_llava(), backend="eager", **options)
    runtime = runtime_in(model)
    looked_up: list[int] = []
    for word in range(FIRST_WORD, FIRST_WORD + 3):
        inputs = batch(model, [[word, IMAGE, FIRST_WORD, word]])
        with torch.no_grad():
            found, wanted = (m(**inputs, logits_to_keep=1) for m in (model, expected))
        assert torch.equal(found.logits, wanted.logits)
        for ours, theirs in zip(
            found.past_key_values.layers, wanted.past_key_values.layers, strict=True
        ):
            assert torch.equal(ours.keys[:, :, : ours.filled], theirs.keys[:, :, : ours.filled])
            assert torch.equal(ours.values[:, :, : ours.filled], theirs.values[:, :, : ours.filled])
        if word == FIRST_WORD:
            (body,) = [b for b in runtime.programs.bodies.values() if b.name == "prefill program"]
            looked_up = without_lookup(body, monkeypatch)
    assert looked_up == []


def test_a_body_that_may_write_is_always_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body, _ = a_body()
    lengths = without_lookup(body, monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            body(torch.randn(2, 5, 8), torch.randn(8, 8))
    assert lengths == [5] * 3


def test_the_number_of_lengths_remembered_is_bounded() -> None:
    body, log = a_body(bypass_guards=True)
    weight = torch.randn(8, 8)
    with torch.no_grad():
        for length in range(2, 150):
            body(torch.randn(2, length, 8), weight)
    assert 1 <= len(body._bypasses) <= 64
    assert len(log.entries) <= 2


# When the compiler fails.


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records
        if r.name == "hidrop_fx" and r.levelno >= logging.WARNING
    ]  # fmt: skip


def test_a_backend_that_fails_costs_speed_only(
    reference: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine\nand a second line")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model, runtime = compiled_llama()
    inputs = batch(model, [[5, 6, IMAGE, 7], [8, IMAGE, 9, 10, 11]])
    assert answer(model, inputs) == answer(reference, inputs)
    lines = warnings_in(caplog)
    bodies = [
        "decode program",
        "prefill layer body 1",
        "prefill layer body 2",
        "prefill prune body 1",
    ]
    assert sorted(line.split(" runs uncompiled: ")[0] for line in lines) == bodies
    assert all("BackendCompilerFailed" in line and "\n" not in line for line in lines)
    assert all("no compiler on this machine" in line for line in lines)
    assert sorted(runtime.programs.log.fallbacks) == sorted(lines)
    assert runtime.programs.log.entries == []
    answer(model, inputs)
    assert len(warnings_in(caplog)) == len(bodies)


def test_training_through_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    losses = []
    for backend in ("aot_eager", "eager"):
        model, _ = compiled_llama(backend=backend)
        inputs = batch(model, [[5, 6, IMAGE, 7]])
        loss = model(**inputs, labels=inputs["input_ids"].clone(), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        assert model.get_decoder().layers[0].mlp.up_proj.weight.grad is not None
    torch.testing.assert_close(losses[0], losses[1])


def test_the_limit_of_variants_costs_speed_only(
    reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, runtime = compiled_llama()
    one = batch(model, [[5, 6, IMAGE, 7]])
    three = batch(model, [[5, 6, IMAGE, 7], [8, 9, IMAGE, 4], [5, 4, IMAGE, 5]])
    with torch._dynamo.config.patch(recompile_limit=1):
        assert answer(model, one) == answer(reference, one)
        assert warnings_in(caplog) == []
        assert answer(model, three) == answer(reference, three)
    lines = warnings_in(caplog)
    assert sorted(line.split(" runs uncompiled: ")[0] for line in lines) == [
        "decode program", "prefill layer body 1", "prefill layer body 2", "prefill prune body 1",
    ]  # fmt: skip
    assert all("FailOnRecompileLimitHit" in line and "\n" not in line for line in lines)
    assert runtime.programs.log.fallbacks == lines
    assert answer(model, one) == answer(reference, one)


def test_an_error_of_the_call_itself_is_not_swallowed(llama: CapturedModel) -> None:
    program = llama.built("train", PLAIN)
    tensors = tensors_of(PLAIN, "train", program)
    tensors["text_embeds"] = tensors["text_embeds"][:, :, :-1]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        lowered(program)(tensors)


# The real compiler.


@dataclasses.dataclass(frozen=True)
class Real:
    model: Any
    runtime: Runtime
    answers: list[list[list[int]]]
    compiled: dict[str, int]


@pytest.fixture(scope="module")
def inductor() -> Real:
    """One model through Inductor, and its answers to three calls."""
    model, runtime = compiled_llama(backend="inductor")
    with counter.expect() as made:
        answers = [answer(model, inputs) for inputs in inductor_calls(model)]
    return Real(model, runtime, answers, counter.names(made.compiled))


def inductor_calls(model: Any) -> list[dict[str, Tensor]]:
    return [
        batch(model, [[5, 6, IMAGE, 7]]),
        batch(model, [[8, 9, 10, IMAGE, 4, 11, IMAGE, 5, 6]]),
        batch(model, [[5, IMAGE, 7, 8, 9]]),
    ]


# One worker, so that the fixture is made once.
@pytest.mark.xdist_group("inductor")
def test_inductor_gives_the_tokens_of_the_eager_backend(inductor: Real, reference: Any) -> None:
    assert inductor.answers == [answer(reference, inputs) for inputs in inductor_calls(reference)]


@pytest.mark.xdist_group("inductor")
def test_inductor_compiles_a_body_once_for_all_lengths(inductor: Real) -> None:
    assert inductor.compiled == {
        "decode program": 1,
        "prefill layer body 1": 1,
        "prefill layer body 2": 1,
        "prefill prune body 1": 1,
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.train(),
        lambda d: d.layers[1].double(),
        lambda d: setattr(d.layers[0].self_attn, "scaling", 0.5),
        lambda d: setattr(d.layers[0].self_attn, "note", torch.zeros(2)),
        lambda d: setattr(d.norm, "weight", nn.Parameter(torch.ones(32))),
        lambda d: d.layers[0].register_buffer("extra", torch.ones(1)),
        lambda d: d.layers[0].register_forward_hook(lambda *_: None),
        lambda d: d.layers[0].mlp.add_module("act_fn", nn.ReLU()),
        lambda d: d.layers.append(nn.Linear(1, 1)),
    ],
)
def test_decoder_snapshot_notices_every_change(change: Callable[[Any], Any]) -> None:
    decoder = tiny_llava("llama").get_decoder()
    decoder.layers[0].self_attn.note = torch.ones(2)
    watch = DecoderSnapshot(decoder)
    assert watch.unchanged(decoder)
    assert not watch.unchanged(copy.deepcopy(decoder))
    change(decoder)
    assert not watch.unchanged(decoder)
