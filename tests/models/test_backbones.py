"""Text decoders of every kind under LLaVA: identity equals transformers, a schedule equals its own layers in a loop."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.analysis.measuring.hooked_decoder import run_with_hooks
from hidrop_fx.analysis.measuring.query_attention import query_attention
from hidrop_fx.capture.export import capture
from tests.support.backbones import TEXT, tiny_backbone
from tests.support.generation import new_tokens
from tests.support.layerwise import layerwise_rows, layerwise_tokens
from tests.support.models import IGNORE, IMAGE, batch, random_labels

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [8, IMAGE, 11, IMAGE, 3], [4, 5, 6, 7, 8]]
EVERYTHING = Schedule(inject=1, prune={1: 6, 2: 3}, exit=3)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}

every_backbone = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(f"backbone_{name}"),
                *([] if name in ("granite", "gemma2", "gpt_oss") else [pytest.mark.families]),
            ],
        )
        for name in TEXT
    ],
)
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def real(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


@every_backbone
def test_a_backbone_equals_transformers_and_its_own_layers(name: str) -> None:
    model = tiny_backbone(name)
    batches = {side: batch(model, ROWS, padding=side) for side in sides()}
    with torch.no_grad():
        whole = {side: model(**inputs).logits for side, inputs in batches.items()}
    answers = new_tokens(model, batches["left"], 4)
    wanted = {side: layerwise_rows(model, EVERYTHING, b) for side, b in batches.items()}
    tokens = layerwise_tokens(model, EVERYTHING, batches["left"], 4)

    hidrop.compile(model, Schedule(), backend="eager")
    for side, inputs in batches.items():
        with torch.no_grad():
            found = model(**inputs).logits
        torch.testing.assert_close(real(inputs, found), real(inputs, whole[side]), **CLOSE)
    assert new_tokens(model, batches["left"], 4) == answers

    hidrop.compile(model, EVERYTHING, backend="eager")
    for side, inputs in batches.items():
        with torch.no_grad():
            found = model(**inputs).logits
        for row, (places, run) in enumerate(wanted[side]):
            at = places[run.columns[-1]]
            torch.testing.assert_close(found[row, at], run.logits, **CLOSE)
        assert new_tokens(model, inputs, 4) == tokens, side


@every_backbone
def test_a_training_step_over_a_backbone_equals_its_own_layers(name: str) -> None:
    check_a_training_step(name, EVERYTHING)


def check_a_training_step(name: str, schedule: Schedule) -> None:
    """Check loss and gradients of a step against the decoder's own layers, one row after another."""
    model = tiny_backbone(name)
    inputs = batch(model, ROWS, padding="right")
    labels = random_labels(inputs)
    labels[:, 0] = IGNORE
    model.train()

    losses, counts = [], 0
    for _, run in layerwise_rows(model, schedule, inputs, labels):
        assert run.labels is not None
        here = run.logits[:, : model.config.text_config.vocab_size]
        known = dict(zip(run.columns[-1], here, strict=True))
        supervised = (run.labels[1:] != IGNORE).nonzero().flatten().tolist()
        rows = torch.stack([known[c] for c in supervised])
        losses.append(
            torch.nn.functional.cross_entropy(rows, run.labels[1:][supervised], reduction="sum")
        )
        counts += len(supervised)
    wanted = torch.stack(losses).sum() / counts
    wanted.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert any("layers.3" in k for k in gradients)
    model.zero_grad(set_to_none=True)

    hidrop.compile(model, schedule, backend="eager")
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, **CLOSE)
    for k, p in model.named_parameters():
        expected = gradients.get(k, torch.zeros_like(p))
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}"
        )


@pytest.mark.families
@pytest.mark.parametrize("name", ["granite", "gemma2", "gpt_oss", "deepseek_v3", "lfm3"])
def test_compare_runs_the_layers_of_a_backbone_as_they_are(name: str) -> None:
    model = hidrop.compile(tiny_backbone(name), EVERYTHING, backend="eager")
    found = hidrop.compare(model, new_tokens=2, **batch(model, ROWS))
    assert found.reference == "loop"
    assert found.ok, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "lfm2"])
def test_a_backbone_on_inductor_answers_as_in_eager_mode(name: str) -> None:
    model = tiny_backbone(name)
    inputs = batch(model, ROWS)
    wanted = layerwise_tokens(model, EVERYTHING, inputs, 3)
    hidrop.compile(model, EVERYTHING)
    assert new_tokens(model, inputs, 3) == wanted
    assert not hidrop.inspect(model).fallbacks


@pytest.mark.parametrize(
    "name",
    [
        "stablelm_parallel",
        "gemma2",
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        "qwen2_moe_window",
    ],
)
def test_attention_beside_a_layer_is_what_the_layer_computes(name: str) -> None:
    model = tiny_backbone(name)
    decoder = model.get_decoder()
    embeds = decoder.get_input_embeddings()(torch.arange(3, 29).view(2, 13))
    wanted: list[Tensor] = []
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda m, a, output: wanted.append(output[1]))
    found: list[Tensor] = []
    queries, valid = torch.tensor([[12, 3], [5, -1]]), torch.ones(2, 13, dtype=torch.bool)

    def measure(index: int, *given: Any) -> None:
        found.append(query_attention(*given, queries, valid))

    run_with_hooks(model, embeds, None, None, on_attention=measure)
    assert len(found) == len(wanted) == 4
    for whole, rows in zip(wanted, found, strict=True):
        torch.testing.assert_close(rows[0], whole[0][:, [12, 3]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[1, :, 0], whole[1][:, 5], rtol=1e-5, atol=1e-6)
        assert not rows[1, :, 1].any()


def test_a_decoder_that_writes_in_place_is_captured_without_the_writes() -> None:
    decoder = tiny_backbone("mixtral").get_decoder()
    graph = capture(decoder).module.graph
    targets = [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert torch.ops.aten.div.Tensor in targets, "the router divides in place"
    assert not [target for target in targets if target._schema.is_mutable]


def test_a_decoder_whose_layers_attend_by_one_mask_in_two_ways_is_refused() -> None:
    model = tiny_backbone("gemma2")
    model.get_decoder().layers[3].self_attn.sliding_window = 5
    hidrop.compile(model, Schedule(), backend="eager")
    with pytest.raises(
        hidrop.HidropError,
        match=r"layers\.3 reads mask_sliding_attention with sliding_window=5, a layer before it with 7",
    ):
        model(**batch(model, ROWS))


def sides() -> tuple[Literal["left", "right"], ...]:
    return ("left", "right")
