"""Vision tokens that no layer updates and text reads at some layers, held against ViCA's rule, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import Schedule, ScheduleError
from hidrop_fx.errors import PassError, UnsupportedModelError
from tests.support.families import CASES
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import compiled_eagerly

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]
LAYERS = 4
SOME = ["vica(layers=(0,2))", "vica(layers=(1,),freeze_system=False)", "reads=0+1+2+3"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-b, a], dim=-1) * sin


def vica(
    model: Any, ids: Tensor, features: Tensor, reads: tuple[int, ...], freeze_system: bool
) -> Tensor:
    """Compute the logits [n, vocabulary] of one row without pads; those of vision places mean nothing.

    All tokens stand in one sequence, and vision rows are put back after every layer: keys of the projector's output by
    the layer's own norm and projections, at the original positions, in one softmax with the text's.
    """
    is_vision = ids.eq(model.config.image_token_id)
    columns = torch.arange(len(ids))
    first = int(is_vision.int().argmax()) if is_vision.any() else 0
    system = columns < first
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(ids)
    hidden[is_vision] = features
    frozen = hidden
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], columns[None]))
    for k, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        split = [
            projection(normed).view(len(ids), -1, attention.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = rotated(split[0], cos, sin), rotated(split[1], cos, sin)
        groups = len(query) // len(key)
        key, value = key.repeat_interleave(groups, 0), split[2].repeat_interleave(groups, 0)
        seen = columns[None] <= columns[:, None]
        if k not in reads:
            seen = seen & ~is_vision[None]
        logits = query @ key.transpose(1, 2) * attention.head_dim**-0.5
        weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1).nan_to_num()
        update = attention.o_proj((weights @ value).transpose(0, 1).flatten(1))
        if freeze_system:
            update = torch.where(system[:, None], 0.0, update)
        hidden = hidden + update
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = torch.where(is_vision[:, None], frozen, hidden)
    logits: Tensor = model.lm_head(decoder.norm(hidden))
    return logits


def rows_of(model: Any, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return ids and features of every row, pads stripped."""
    images = iter(model.get_image_features(inputs["pixel_values"]).pooler_output)
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        own = ids[mask.bool()]
        places, features = int(own.eq(model.config.image_token_id).sum()), []
        while sum(map(len, features)) < places:
            features.append(next(images))
        empty = model.lm_head.weight.new_zeros(0, model.lm_head.in_features)
        found.append((own, torch.cat([empty, *features])))
    return found


def generated(model: Any, schedule: Schedule, inputs: dict[str, Tensor], new: int) -> Any:
    found = []
    for ids, features in rows_of(model, inputs):
        for _ in range(new):
            logits = vica(model, ids, features, schedule.reads or (), schedule.freeze_system)
            ids = torch.cat([ids, logits[-1:].argmax(dim=-1)])
        found.append(ids[-new:].tolist())
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", SOME)
@torch.no_grad()
def test_generates_what_the_rule_generates(llava: Any, text: str, padding: Any) -> None:
    schedule = Schedule.parse(text, LAYERS)
    inputs = batch(llava, ROWS, padding=padding)
    expected = generated(llava, schedule, inputs, 5)
    rows = rows_of(llava, inputs)
    with compiled_eagerly(llava, schedule):
        found = llava.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        out = llava(**inputs, use_cache=True)
        report = hidrop.compare(llava, **inputs)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert report.ok, str(report)
    for row, (ids, features) in enumerate(rows):
        logits = vica(llava, ids, features, schedule.reads or (), schedule.freeze_system)
        text_places = ~ids.eq(llava.config.image_token_id)
        own = out.logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(own[text_places], logits[text_places], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_caches_hold_vision_tokens_where_they_are_read(llava: Any) -> None:
    inputs = batch(llava, [[5, 6, 7, IMAGE, 8, 9, 10]])
    vision = int(inputs["input_ids"].eq(llava.config.image_token_id).sum())
    with compiled_eagerly(llava, SOME[0]):
        cache = llava(**inputs, use_cache=True).past_key_values
    planned = hidrop.plan(SOME[0], llava, text_tokens=6)
    held = [layer.filled for layer in cache.layers]
    assert held == [6 + vision, 6, 6 + vision, 6]
    token = 2 * 2 * 8 * 4  # keys and values of two heads of 8 in fp32
    assert [tokens * token for tokens in held] == list(planned.layer_kv_bytes)


@pytest.mark.parametrize("text", SOME)
def test_a_training_step_has_the_gradients_of_the_rule(text: str) -> None:
    model = tiny_llava("llama", num_layers=LAYERS, kv_heads=2)
    schedule = Schedule.parse(text, LAYERS)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 9, 10], [8, 9, IMAGE, 4, IMAGE, 3, 3, 5]])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-2] = -100  # an image place whose output is needed would count as text
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    total, count = torch.zeros(()), 0
    for (ids, features), mask, labels in zip(
        rows_of(model, inputs), inputs["attention_mask"], inputs["labels"], strict=True
    ):
        logits = vica(model, ids, features, schedule.reads or (), schedule.freeze_system)
        wanted = labels[mask.bool()][1:]
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], wanted, ignore_index=-100, reduction="sum"
        )
        count += int((wanted != -100).sum())
    expected = total / count
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model, schedule):
        loss, found = step(model, inputs)
    torch.testing.assert_close(loss, expected)
    assert_gradients_close(found, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends_agree(backend: str) -> None:
    model = tiny_llava("qwen3", num_layers=LAYERS, kv_heads=2)
    inputs = batch(model, ROWS)
    labelled = batch(model, [[5, 6, IMAGE, 7, 8, 9, 10], [8, 9, IMAGE, 4, IMAGE, 3, 3, 5]])
    labelled["labels"] = labelled["input_ids"].clone()
    labelled["labels"][:, :-2] = -100
    found = []
    for name in ("eager", backend):
        hidrop.compile(model, SOME[0], backend=name)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append((ids.tolist(), *step(model, labelled)))
        hidrop.restore(model)
        model.zero_grad(set_to_none=True)
    (ids, loss, gradients), (other, other_loss, other_gradients) = found
    assert ids == other
    torch.testing.assert_close(loss, other_loss)
    assert_gradients_close(other_gradients, gradients)


@torch.no_grad()
def test_recorded_saved_and_replayed(llava: Any, tmp_path: Path) -> None:
    inputs = batch(llava, ROWS, padding="left")
    schedule = Schedule.parse(SOME[0], LAYERS)
    expected = generated(llava, schedule, inputs, 4)
    hidrop.compile(llava, schedule, backend="eager", cuda_graphs=True, bucket_multiple=8)
    for _ in range(3):
        found = llava.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert found[:, -4:].tolist() == expected
    hidrop.dump(llava, tmp_path / "dump")
    hidrop.save(llava, tmp_path)
    hidrop.restore(llava)
    replayed = hidrop.replay(tmp_path / "dump", llava, **inputs)
    assert replayed.ok, str(replayed)
    hidrop.load(llava, tmp_path, backend="eager")
    found = llava.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    hidrop.restore(llava)
    assert found[:, -4:].tolist() == expected


def test_costs_are_four_percent_of_the_vision_tokens_work() -> None:
    """ViCA's own figure for a 7B model, by the papers' count."""
    planned = hidrop.plan(
        "vica", num_layers=32, hidden_size=4096, intermediate_size=11008, vision_tokens=576
    )
    assert planned.vision_flops / planned.identity.vision_flops == pytest.approx(0.04, abs=0.005)
    assert "0-31  frozen        0       64" in str(planned)
    assert "text reads 576 frozen vision tokens at layer 0, 1, 7, 8, 9, 10, 11, 14" in str(planned)
    assert planned.flops < 0.2 * planned.identity.flops


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reads": ()}, r"reads=\(\) names no layer"),
        ({"reads": (1, 1)}, "names layer 1 twice"),
        ({"reads": "01"}, "reads='01' is a str"),
        ({"reads": (-1,)}, "reads layer=-1 is too small"),
        ({"reads": (0,), "exit": 2}, r"exit=2 beside reads=\(0,\)"),
        ({"reads": (0,), "prune": {1: 2}}, r"prune={1: 2} beside reads=\(0,\)"),
        ({"reads": (0,), "positions": "compact"}, "positions='compact' beside reads"),
        ({"freeze_system": True}, "freeze_system=True keeps text"),
        ({"reads": (0,), "freeze_system": "no"}, "freeze_system='no': use True or False"),
    ],
)
def test_bad_schedules_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(**fields)


def test_a_layer_that_the_model_lacks_is_named(llava: Any) -> None:
    with pytest.raises(ScheduleError, match="reads layer 7 but the model has 4 layers"):
        hidrop.compile(llava, "vica(layers=(0,7))")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_decoder_that_makes_more_of_an_image_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"reads=\(0,\) lets no layer update"):
        hidrop.compile(CASES[name].make(), "reads=0")


@torch.no_grad()
def test_a_biased_output_projection_cannot_be_held() -> None:
    model = tiny_llava("llama", num_layers=2)
    model.get_decoder().layers[1].self_attn.o_proj = torch.nn.Linear(32, 32)
    with (
        compiled_eagerly(model, "vica(layers=(0,))"),
        pytest.raises(PassError, match=r"output projection without a bias.*freeze_system=False"),
    ):
        model(**batch(model, [ROWS[0]]))
