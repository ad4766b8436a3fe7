"""Layer bodies: how many there are, what they take, and that all lowerings agree."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hidrop_fx import Plan, Schedule
from hidrop_fx.lowering.checkpointing import Recomputable
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.lowering.outline import lower
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention_scores import attention_scores
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.planning.batch_layout import lay_out
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.program.program import Program
from hidrop_fx.program.variant import Kind
from tests.support.captured import CapturedModel, capture_of
from tests.support.lowered import FILTERED, LAYERS, WIDTH
from tests.support.models import tiny_llava
from tests.support.programs import prompt_inputs


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


def test_on_a_cpu_a_prefill_compiles_of_a_prune_the_keys_alone(llama: CapturedModel) -> None:
    program = llama.built("prefill", FILTER)
    assert set(program.subgraphs.values()) == {"keys_1", "score_1", "prune_1"}
    executable = lowered(program)
    assert users(executable) == {
        "prefill layer body 1": ["prefill layer_0", "prefill layer_2"],
        "prefill keys body 1": ["prefill keys_1"],
        "prefill layer body 2": ["prefill layer_1"],
    }
    called = [n.target for n in executable.top.graph.nodes]
    assert attention_scores in called
    assert tokens.surviving_columns in called
    assert tokens.take_keys in called
    assert users(lowered(program, "whole")) == {"prefill program": ["prefill"]}


def test_elsewhere_a_score_and_a_prune_are_bodies_of_their_own(
    llama: CapturedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = llama.built("prefill", FILTER)
    monkeypatch.setattr(program, "device", torch.device("meta"))
    assert users(lowered(program)) == {
        "prefill layer body 1": ["prefill layer_0", "prefill layer_2"],
        "prefill score body 1": ["prefill score_1"],
        "prefill prune body 1": ["prefill prune_1"],
        "prefill layer body 2": ["prefill layer_1"],
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
    # Training hands no keys and values out of a layer, and compiles scores.
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
    # Beside it, the queries of the rows that score.
    projected = sum("linear" in str(n.target) for n in operations)
    assert projected == (kind == "prefill" and schedule == FILTER)


def test_a_whole_program_is_one_call(llama: CapturedModel) -> None:
    executable = lowered(llama.built("train", FILTER), "whole")
    (call,) = body_calls(executable)
    picked = [n for n in executable.top.graph.nodes if n.op == "call_function" and n is not call]
    assert {n.target for n in picked} == {operator.getitem}
    assert users(executable) == {"train program": ["train"]}


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


def test_an_error_of_the_call_itself_is_not_swallowed(llama: CapturedModel) -> None:
    program = llama.built("train", PLAIN)
    tensors = tensors_of(PLAIN, "train", program)
    tensors["text_embeds"] = tensors["text_embeds"][:, :, :-1]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        lowered(program)(tensors)
