"""Layers of one kind are traced once: the graph is the one that a trace of every layer gives, whatever the layers do."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from operator import attrgetter
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import hidrop_fx as hidrop
from hidrop_fx.capture import export as export_module
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.repeated_layers import RepeatedLayers
from hidrop_fx.capture.watched_number import WatchedNumber, plain_number
from hidrop_fx.ops.repeated_layer import LAYER_LIKE
from hidrop_fx.program.operands import operand_text
from hidrop_fx.runtime.captures import capture_model
from tests.support.backbones import TEXT, tiny_backbone
from tests.support.families import CASES
from tests.support.models import batch, tiny_llava

QUICK = ("cohere2", "mixtral", "lfm2")
every_class = [
    *(
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow], id=f"backbone {name}")
        for name in TEXT
    ),
    *(pytest.param(name, marks=[pytest.mark.slow], id=f"family {name}") for name in CASES),
]


class _EachLayer(RepeatedLayers):
    """Takes no two layers for one kind."""

    def __enter__(self) -> RepeatedLayers:
        return self

    def expand(self, program: Any) -> None:
        return None


def traced_one_by_one(model: Any) -> CapturedDecoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "RepeatedLayers", _EachLayer)
        return capture_model(model).decoder


def values_of(graph: fx.Graph) -> list[str]:
    """Return each tensor of a graph as what computes it, down to the inputs; a size is the number that it is."""
    known: dict[fx.Node, str] = {}
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, int | torch.SymInt):
            known[node] = f"({value})"
            continue
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        target = node.name if node.op == "placeholder" else node.target
        shape = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else ""
        line = f"{target} {operand_text(node, known.__getitem__)} {shape} {stack[-1:]}"
        known[node] = hashlib.sha256(line.encode()).hexdigest()
        found.append(known[node])
    return sorted(found)


@pytest.mark.parametrize("name", every_class)
def test_the_graph_is_that_of_every_layer_traced(name: str) -> None:
    model = (CASES[name].make() if name in CASES else tiny_backbone(name)).eval()
    found, wanted = capture_model(model).decoder, traced_one_by_one(model)
    assert values_of(found.module.graph) == values_of(wanted.module.graph)
    for node in found.module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        assert attrgetter(name)(found.module) is attrgetter(name)(wanted.module)


@contextmanager
def copies_noted() -> Iterator[list[tuple[int, int]]]:
    """Note which layers are copies, each with the one that was traced."""
    found: list[tuple[int, int]] = []

    class Noting(RepeatedLayers):
        def expand(self, program: Any) -> None:
            found.extend(node.args[2:] for node in program.graph.nodes if node.target is LAYER_LIKE)
            super().expand(program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "RepeatedLayers", Noting)
        yield found


def written_in_llama(function: Any) -> Any:
    """Return a function as if it stood in transformers' file."""
    code, closure = function.__code__, function.__closure__
    return FunctionType(code, vars(modeling_llama), code.co_name, function.__defaults__, closure)


def llama(num_layers: int = 4) -> Any:
    return tiny_llava("llama", num_layers=num_layers)


def check_against_hugging_face(model: Any) -> None:
    inputs = batch(model, [[5, 6, 7, 8], [9, 10, 11]], padding="right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**inputs).logits[real]
        hidrop.compile(model, hidrop.Schedule(), backend="eager")
        torch.testing.assert_close(model(**inputs).logits[real], wanted, rtol=1e-4, atol=1e-5)


def test_layers_of_one_kind_are_traced_once() -> None:
    with copies_noted() as found:
        capture_model(llama())
    assert found == [(1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("index", [0, 2])
def test_a_layer_that_differs_in_an_attribute_is_traced_for_itself(index: int) -> None:
    model = llama()
    norm: Any = model.get_decoder().layers[index].input_layernorm
    norm.variance_epsilon = 0.5
    with copies_noted() as found:
        capture_model(model)
    assert found == ([(2, 1), (3, 1)] if index == 0 else [(1, 0), (3, 0)])
    check_against_hugging_face(model)


@pytest.mark.parametrize(
    "scale",
    [
        lambda number: [1.0, 1.5, 0.5, 2.0][number],
        lambda number: 1.0 + 0.5 * number,  # C code that takes no watched number
        lambda number: torch.ones(4).mul(number)[0] + 1.0,
    ],
)
def test_a_layer_that_looks_at_its_number_is_traced_for_itself(
    monkeypatch: pytest.MonkeyPatch, scale: Any
) -> None:
    own = LlamaAttention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, scale(self.layer_idx) * hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", written_in_llama(forward))
    with copies_noted() as found:
        check_against_hugging_face(llama())
    assert found == []


def test_a_layer_of_ones_own_code_is_traced_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may count its calls."""
    own, calls = LlamaAttention.forward, count()

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = [1.0, 1.5, 0.5, 2.0][next(calls) % 4]
        return own(self, scale * hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with copies_noted() as found:
        check_against_hugging_face(llama())
    assert found == []


def test_a_layer_that_calls_a_function_of_ones_own_is_traced_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, calls = modeling_llama.apply_rotary_pos_emb, count()

    def rotate(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own((1.0 + next(calls) % 4) * q, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    with copies_noted() as found:
        check_against_hugging_face(llama())
    assert found == []


def test_a_layer_that_reads_what_it_is_not_called_with_is_traced_for_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = LlamaDecoderLayer.forward
    noted: list[Tensor] = []

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        noted.append(hidden_states)
        return own(self, hidden_states + 0.5 * noted[-2], *args, **kwargs)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        noted[:] = [kwargs["inputs_embeds"] * 2]

    model = llama()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", written_in_llama(forward))
    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        found = capture_model(model).decoder
    wanted = traced_one_by_one(model)
    assert values_of(found.module.graph) == values_of(wanted.module.graph)
    assert "LlamaModel is traced layer by layer: layers.0 reads mul" in caplog.text


def test_a_layer_that_is_called_in_several_ways_is_traced_for_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = llama()
    decoder = model.get_decoder()

    def call_first(module: nn.Module, args: Any, kwargs: Any) -> None:
        decoder.layers[0](torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8),) * 2)

    decoder.register_forward_pre_hook(call_first, with_kwargs=True)
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        found = capture_model(model).decoder
    wanted = traced_one_by_one(model)
    assert values_of(found.module.graph) == values_of(wanted.module.graph)
    assert "LlamaModel is traced layer by layer: layers.0 is called in several ways" in caplog.text


def test_a_layer_with_a_hook_is_traced_for_itself() -> None:
    model = llama()
    layer: Any = model.get_decoder().layers[2]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: 3 * output)
    with copies_noted() as found:
        capture_model(model)
    assert found == [(1, 0), (3, 0)]
    check_against_hugging_face(model)
    handle.remove()


def test_weights_shared_by_layers_are_shared_in_the_graph() -> None:
    model = llama()
    layers: Any = model.get_decoder().layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    check_against_hugging_face(model)


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    before = [dict(vars(module)) for module in model.modules()]
    capture_model(model)
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize(
    "question",
    [
        lambda n: [7, 8, 9][n],
        lambda n: n == 1,
        lambda n: n in {1, 2},
        lambda n: n % 2,
        lambda n: 3 - n,
        lambda n: f"{n}",
        lambda n: bool(n),
        lambda n: isinstance(n, int),
        lambda n: torch.zeros(3)[n],
        lambda n: list(range(n)),
    ],
)
def test_each_question_to_a_watched_number_is_noted(question: Any) -> None:
    number = WatchedNumber(1)
    found, wanted = question(number), question(1)
    assert type(found) is type(wanted)
    assert found == wanted
    assert number.seen


def test_a_plain_number_is_no_question() -> None:
    number = WatchedNumber(1)
    assert plain_number(number) == 1
    assert plain_number(None) is None
    assert number is not None
    assert not number.seen
