"""A model on two GPUs of one process, by accelerate's `dispatch_model`, against the same model on one device.

On GPUs where there are two; `test_on_simulated_pair.py` runs all of it on simulated ones.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support import counter
from tests.support.backbones import tiny_backbone
from tests.support.dispatched import BALANCED, BESIDE_CPU, TO_AND_FRO, Map, dispatched
from tests.support.generation import new_tokens
from tests.support.gradients import assert_gradients_close, gradients, step
from tests.support.models import IMAGE, PRUNED, batch, supervised, tiny_llava
from tests.support.ratios import DTOPK

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 5
MAPS: dict[str, Map] = {"balanced": BALANCED, "to and fro": TO_AND_FRO, "beside cpu": BESIDE_CPU}
maps = pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)


def whole(schedule: str = PRUNED, **options: Any) -> Any:
    return hidrop.compile(tiny_llava(**options), schedule, backend="eager")


def spread(places: Map, schedule: str = PRUNED, *, before: bool = True, **options: Any) -> Any:
    """Dispatch a model, then compile it; or the other way round."""
    model = tiny_llava(**options)
    if before:
        model = dispatched(model, places)
    model = hidrop.compile(model, schedule, backend="eager")
    return model if before else dispatched(model, places)


def on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return batch(tiny_llava(), ROWS)


@maps
@pytest.mark.parametrize("before", [True, False], ids=["dispatched first", "compiled first"])
def test_answers_are_those_of_one_device(
    places: Map, before: bool, inputs: dict[str, Tensor]
) -> None:
    one = whole()
    expected = new_tokens(one, inputs, NEW)
    model = spread(places, before=before)
    with counter.expect(captures=1):
        for device in ("cpu", "cuda:0", "cuda:1"):
            given = {name: value.to(device) for name, value in inputs.items()}
            assert new_tokens(model, given, NEW) == expected
    with torch.no_grad():
        found, logits = model(**inputs).logits, one(**inputs).logits
    assert found.device == inputs["input_ids"].device, "as accelerate's hook of the model does"
    torch.testing.assert_close(found.cpu(), logits, rtol=1e-4, atol=1e-4)


def test_buffers_lie_with_their_layers(inputs: dict[str, Tensor]) -> None:
    model = spread(TO_AND_FRO)
    cache = HidropCache(max_length=60)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    found = [layer.keys.device.index for layer in cache.layers]
    assert found == [1, 0, 1, 0] == [layer.values.device.index for layer in cache.layers]
    assert {t.device.index for t in cache.log.prompt_columns.values()} == {0}


@maps
def test_a_step_of_training_is_that_of_one_device(places: Map) -> None:
    one, model = whole().train(), spread(places).train()
    given = supervised(one, ROWS, label_seed=3)
    expected, all_gradients = step(one, given)
    loss, found = step(model, given)
    torch.testing.assert_close(loss.cpu(), expected)
    trained = {n for n, p in model.named_parameters() if not p.is_meta}
    assert found.keys() == all_gradients.keys() & trained
    assert len(found) < len(all_gradients) or places is not BESIDE_CPU
    assert_gradients_close(on_cpu(found), {n: all_gradients[n] for n in found})


def test_checkpointed_layers_and_several_steps() -> None:
    one, model = whole().train(), spread(TO_AND_FRO).train()
    model.gradient_checkpointing_enable()
    given = supervised(one, ROWS, label_seed=3)
    for each in (one, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            each(**given).loss.backward()
            optimizer.step()
    found = {n: p.detach().cpu() for n, p in model.named_parameters()}
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", ["hard", "soft"])
def test_ratios_are_learned_across_devices(rank: str) -> None:
    schedule = DTOPK if rank == "hard" else f"{DTOPK},rank=soft"
    one, model = whole(schedule).train(), spread(TO_AND_FRO, schedule).train()
    assert model.hidrop_ratios.values.device == torch.device("cuda", 0)
    given = supervised(one, ROWS, label_seed=3)
    step(one, given)
    step(model, given)
    name = "hidrop_ratios.values"
    torch.testing.assert_close(gradients(model)[name].cpu(), gradients(one)[name])


def test_what_is_saved_is_loaded_on_one_device(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    model = spread(BALANCED, DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values.copy_(torch.tensor([0.4, 0.8]))
    tokens = new_tokens(model, inputs, NEW)
    model.save_pretrained(tmp_path)
    plain = tiny_llava()  # the simulation leaves buffers that no file holds without values
    plain.load_state_dict(LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict())
    loaded = hidrop.load(plain, tmp_path, backend="eager")
    assert new_tokens(loaded, inputs, NEW) == tokens


def test_restored_it_is_the_model_that_accelerate_made(inputs: dict[str, Tensor]) -> None:
    model = dispatched(tiny_llava(), TO_AND_FRO)
    forward = model.__dict__["forward"]
    hidrop.restore(hidrop.compile(model, PRUNED, backend="eager"))
    assert model.__dict__["forward"] is forward
    with torch.no_grad():
        found, expected = model(**inputs).logits, tiny_llava()(**inputs).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_graphs_and_one_whole_graph_are_left_off_and_said(
    inputs: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hidrop_fx")
    model = dispatched(tiny_llava(), BALANCED)
    hidrop.compile(model, PRUNED, backend="eager", cuda_graphs=True, lowering="whole")
    with counter.expect(recorded=0):
        for _ in range(2):
            new_tokens(model, inputs, NEW)
    for words in ("without CUDA graphs", "called one by one", "not beside it"):
        (line,) = [r.getMessage() for r in caplog.records if words in r.getMessage()]
        assert "the text decoder runs on cuda:0, cuda:1" in line


def test_a_layer_on_two_devices_is_refused() -> None:
    places = {k: v for k, v in BALANCED.items() if not k.endswith("layers.2")}
    layer = "model.language_model.layers.2"
    parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    places |= {f"{layer}.{part}": 1 for part in parts} | {f"{layer}.mlp": 0}
    model = dispatched(tiny_llava(), places)
    with pytest.raises(
        hidrop.UnsupportedModelError, match=r"layers\.2 .*itself \(.*cuda:1 and .*cuda:0\)"
    ):
        hidrop.compile(model, PRUNED)
    assert not hidrop.is_compiled(model)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_other_modes_of_generate(options: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    one, model = whole(), spread(TO_AND_FRO)
    given = {"max_new_tokens": NEW, "do_sample": False} | options
    if "prompt_lookup_num_tokens" in options:
        inputs = batch(tiny_llava(), ROWS[:1])
    found, expected = (
        each.generate(**{k: v.to(each.device) for k, v in inputs.items()}, **given)
        for each in (model, one)
    )
    if isinstance(found, Tensor):
        assert torch.equal(found.cpu(), expected)
        return
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        for state, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(state.cpu(), other, rtol=1e-4, atol=1e-4)


def test_a_second_turn_and_embeddings(inputs: dict[str, Tensor]) -> None:
    one, model = whole(), spread(TO_AND_FRO)
    more = torch.tensor([[5, 6]] * len(ROWS))
    found = []
    for each in (one, model):
        with torch.no_grad():
            first = each(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
            cache = first.past_key_values
            second = each(input_ids=more, attention_mask=mask, past_key_values=cache)
            embeds = each.get_input_embeddings()(inputs["input_ids"])
            given = {k: v for k, v in inputs.items() if k != "input_ids"}
            third = each(inputs_embeds=embeds, **given)
        found.append([each.logits.cpu() for each in (second, third)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        "fastv",
        "pyramiddrop(layers=(1,2,3))",
        "sparsevlm(layers=(1,2),keeps=(4,2))",
        "inject=1,prune=2:4,score=random,exit=3",
        "inject=0,prune=1:6+2:3,positions=compact",
        "inject=1,exit=3,positions=group",
    ],
)
def test_other_schedules(schedule: str, inputs: dict[str, Tensor]) -> None:
    one, model = whole(schedule), spread(TO_AND_FRO, schedule)
    if "random" in schedule:
        assert len(new_tokens(model, inputs, NEW)) == len(ROWS)
        return
    assert new_tokens(model, inputs, NEW) == new_tokens(one, inputs, NEW)


@pytest.mark.parametrize("backbone", ["gemma2", "olmo2", "phi3"])
def test_other_decoders(backbone: str) -> None:
    one = tiny_backbone(backbone)
    given = batch(one, ROWS)
    model = dispatched(tiny_backbone(backbone), BALANCED)
    for each in (one, model):
        hidrop.compile(each, PRUNED, backend="eager")
    assert new_tokens(model, given, NEW) == new_tokens(one, given, NEW)
