"""Layers on their devices: where the nodes of a program run, and what is copied. With two GPUs, or two simulated ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import hidrop_fx as hidrop
from hidrop_fx import passes
from hidrop_fx.passes.kv_cache import write_kv
from hidrop_fx.passes.place_layers import copied
from hidrop_fx.program.program import Program
from tests.support.captured import FULL, CapturedModel
from tests.support.dispatched import BALANCED, TO_AND_FRO, Map, dispatched
from tests.support.graphs import calls
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.runtimes import runtime_in

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 10, 11, 12, 13]]


def programs(places: Map, schedule: str) -> dict[str, Program]:
    """Programs of a prompt, of the token behind it, and of training, by kind."""
    model = hidrop.compile(dispatched(tiny_llava(), places), schedule, backend="eager")
    inputs = batch(tiny_llava(), ROWS)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
        model(**inputs, use_cache=False)
    (capture,) = runtime_in(model).programs.captures.values()
    return {e.program.kind: e.program for e in capture.executables.values()}


def crossings(program: Program) -> dict[str, list[str]]:
    """Names of the values that are copied, by the device that they are copied to."""
    found: dict[str, list[str]] = {}
    for node in calls(program.graph, copied):
        found.setdefault(str(node.args[1]), []).append(str(node.args[0]))
    return found


def device_of(node: fx.Node) -> Any:
    return node.meta["val"].device


def test_a_model_on_one_device_stays_as_it_is(llama: CapturedModel) -> None:
    program = llama.finished("prefill", **FULL)
    before = [str(node) for node in program.graph.nodes]
    result = program.apply(passes.place_layers)
    assert (result.matched, result.note) == (0, "one device")
    assert [str(node) for node in program.graph.nodes] == before
    assert "place_layers" not in [stage.name for stage in program.history[:-1]]


@two_gpus
def test_a_value_is_copied_once_to_a_device_that_reads_it() -> None:
    """Without events: hidden states, cos and sin behind the second layer; in decode slots of the buffers too."""
    found = programs(BALANCED, "inject=0")
    live_out = {kind: str(p.regions[1].live_out) for kind, p in found.items()}
    for kind in ("train", "prefill"):
        copies = crossings(found[kind])
        assert len(copies["cuda:1"]) == len(set(copies["cuda:1"])), kind
        assert live_out[kind] in copies["cuda:1"]
        rows = [n for n in copies["cuda:1"] if n.startswith("take_tokens")]
        assert len(rows) == 2, "cos and sin"
    copies = crossings(found["decode"])
    assert set(copies) == {"cuda:1"}
    assert live_out["decode"] in copies["cuda:1"]
    assert [n for n in copies["cuda:1"] if n.startswith("slots_")] == ["slots_text"]
    assert len(copies["cuda:1"]) == 4


@two_gpus
@pytest.mark.parametrize("places", [BALANCED, TO_AND_FRO], ids=["balanced", "to and fro"])
def test_each_layer_runs_where_its_weights_and_buffers_are(places: Map) -> None:
    layers = "model.language_model.layers"
    for kind, program in programs(places, PRUNED).items():
        for region in program.regions:
            device = torch.device("cuda", places[f"{layers}.{region.layer}"])
            inside = set(region.nodes)
            assert device_of(region.live_out) == device_of(region.hidden) == device, kind
            for node in inside:
                for read in node.all_input_nodes:
                    if isinstance(read.meta.get("val"), torch.Tensor):
                        assert device_of(read) == device, (kind, node, read)
            if kind != "train":
                for name in ("keys", "values"):
                    buffer = program.placeholder_named(f"{name}_{region.layer}")
                    assert device_of(buffer) == device
        for write in calls(program.graph, write_kv):
            assert device_of(write.args[0]) == device_of(write.args[1])
        columns = [n for name, n in program.outputs.items() if name.startswith("columns_")]
        assert {device_of(node) for node in columns} <= {program.device}
        assert device_of(program.outputs["hidden"]) == torch.device("cuda", 1), "the norm's"


@two_gpus
def test_tensors_are_made_where_they_are_used() -> None:
    """No node names the device that the decoder was traced on where it runs on another."""
    for program in programs(TO_AND_FRO, PRUNED).values():
        for node in program.graph.nodes:
            named = node.kwargs.get("device")
            if isinstance(named, torch.device) and isinstance(node.meta.get("val"), torch.Tensor):
                assert named == device_of(node), node


@two_gpus
def test_a_pass_of_ones_own_runs_where_it_stands() -> None:
    scale = torch.nn.Parameter(torch.full((32,), 2.0, device="cuda:0"))

    def scaled(program: Program, plan: Any) -> Any:
        region = program.regions[2]
        weight = program.add_parameter("scale", scale)
        new = program.call(torch.mul, region.hidden, weight, before=region.nodes[0])
        region.read(region.hidden, new)
        region.hidden = new
        return hidrop.PassResult(matched=1)

    found = []
    for places in (None, BALANCED):
        model = tiny_llava() if places is None else dispatched(tiny_llava(), places)
        scale.data = scale.data.to("cpu" if places is None else "cuda:0")
        hidrop.compile(model, "inject=0", backend="eager", passes=[scaled])
        with torch.no_grad():
            found.append(model(**batch(tiny_llava(), ROWS)).logits.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
