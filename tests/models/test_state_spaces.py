"""Mamba and Mamba-2 layers, alone, beside attention and among layers of single tokens: pads, caches, gradients, schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bamba import modeling_bamba
from transformers.models.jamba import modeling_jamba

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.ops.state_space import causal_scan, prompt_scan, scan_over
from hidrop_fx.runtime.kv.layer import HidropLayer, RecurrentLayer
from tests.models.test_backbones import check_a_training_step
from tests.support.backbones import tiny_backbone
from tests.support.generation import new_tokens
from tests.support.layerwise import layerwise_rows, layerwise_tokens
from tests.support.models import IMAGE, batch
from tests.support.runtimes import compiled_eagerly, runtime_in

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
PLAIN: list[list[int | str]] = [[5, 6, 7, 8, 9, 10, 11], [8, 11, 3], [4]]
WORDS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [8, IMAGE, 11, IMAGE, 3], [4, 5]]
KINDS = ["mamba_2", "mamba"]
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def given(kind: str, tokens: int) -> tuple[list[Tensor], list[Any]]:
    """What is read and written, values, steps and rates for three rows; module, chunk, and bounds of a step."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "mamba":
        q, k, v = normal(3, 1, tokens, 5), normal(3, 1, tokens, 5), normal(3, 1, tokens, 8)
        return [q, k, v, normal(3, tokens, 8).abs(), -normal(8, 5).abs()], [
            modeling_jamba.__name__, 0, 0.0, None,
        ]  # fmt: skip
    q, k, v = normal(3, 2, tokens, 5), normal(3, 2, tokens, 5), normal(3, 4, tokens, 6)
    return [q, k, v, normal(3, tokens, 4).abs(), -normal(4).abs()], [
        modeling_bamba.__name__, 4, 0.3, 1.2,
    ]  # fmt: skip


def one_by_one(tensors: list[Tensor], row: int, places: list[int], state: Tensor) -> Any:
    """The recurrence of a row in float64: what is read [H, n, P], and the state [H, P, N] behind it."""
    q, k, v, step, rates = (each.double() for each in tensors)
    heads = v.shape[1]
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k))
    state, out = state.double(), []
    for t in places:
        width = step[row, t][None, :, None] if rates.dim() == 2 else step[row, t][:, None, None]
        rate = rates[None] if rates.dim() == 2 else rates[:, None, None]
        written = torch.einsum("hp,hn->hpn", v[row, :, t], k[row, :, t])
        state = state * (width * rate).exp() + width * written
        out.append(torch.einsum("hpn,hn->hp", state, q[row, :, t]))
    return torch.stack(out, dim=1).float(), state.float()


def bounded(tensors: list[Tensor], how: list[Any]) -> list[Tensor]:
    *read, step, rates = tensors
    return [*read, step.clamp(how[2], how[3]), rates]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_padding_leaves_the_state_behind_a_prompt_as_it_is(kind: str, tokens: int) -> None:
    """Also where a row has none but padding, and where a step has a bound that zero is not within."""
    tensors, how = given(kind, tokens)
    table = torch.zeros(3, tokens + 4, dtype=torch.bool)
    real = [tokens, max(1, tokens - 2), 0]
    columns = torch.full((3, tokens), table.shape[1] - 1)
    for row, count in enumerate(real):
        columns[row, :count] = torch.arange(count)
    out, state = prompt_scan(*tensors, *how, columns, table)
    heads, width, places = tensors[2].shape[1], tensors[2].shape[3], tensors[1].shape[3]
    empty = torch.zeros(heads, width, places)
    for row, count in enumerate(real):
        if not count:
            torch.testing.assert_close(state[row], empty)
            continue
        wanted, after = one_by_one(bounded(tensors, how), row, list(range(count)), empty)
        torch.testing.assert_close(out[row, :, :count], wanted, **CLOSE)
        torch.testing.assert_close(state[row], after, **CLOSE)
    torch.testing.assert_close(causal_scan(*tensors, *how)[0], out[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_new_tokens_go_on_from_a_state_and_padding_among_them_does_not(
    kind: str, tokens: int
) -> None:
    """One token alone has no bounds for its step, as in transformers."""
    tensors, how = given(kind, tokens)
    generator = torch.Generator().manual_seed(7)
    heads, width, places = tensors[2].shape[1], tensors[2].shape[3], tensors[1].shape[3]
    state = torch.randn(3, heads, width, places, generator=generator)
    shown = torch.rand(3, tokens, generator=generator) < 0.6
    shown[0], shown[2] = True, False
    order, counts = (~shown).int().argsort(dim=1, stable=True), shown.sum(dim=1)
    out, after = scan_over(*tensors, *how, state, order, counts)
    steps = tensors if tokens == 1 else bounded(tensors, how)
    for row in range(3):
        at = shown[row].nonzero().flatten().tolist()
        if not at:
            torch.testing.assert_close(after[row], state[row])
            continue
        wanted, end = one_by_one(steps, row, at, state[row])
        torch.testing.assert_close(out[row][:, at], wanted, **CLOSE)
        torch.testing.assert_close(after[row], end, **CLOSE)
    whole = scan_over(*tensors, *how, state, None, None)
    torch.testing.assert_close(whole[0][0], out[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_operator_has_the_gradients_of_the_recurrence(kind: str, tokens: int) -> None:
    tensors, how = given(kind, tokens)
    shape = tensors[2].shape[1], tensors[2].shape[3], tensors[1].shape[3]
    found, wanted = (
        [each.clone().requires_grad_() for each in (*tensors, torch.ones(3, *shape) / 7)]
        for _ in range(2)
    )
    out, after = scan_over(*found[:5], *how, found[5], None, None)
    (out.square().sum() + after.sin().sum()).backward()
    steps = wanted[:5] if tokens == 1 else bounded(wanted[:5], how)
    for row in range(3):
        out, after = one_by_one(steps, row, list(range(tokens)), wanted[5][row])
        (out.square().sum() + after.sin().sum()).backward(retain_graph=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "bamba",
        *(
            pytest.param(n, marks=pytest.mark.families)
            for n in ("falcon_h1", "nemotron_h_between", "jamba")
        ),
    ],
)
def test_pads_change_no_answer_and_several_tokens_behind_a_prompt_are_those_of_the_text(
    name: str,
) -> None:
    model = tiny_backbone(name)
    rows: list[list[int | str]] = [[5], [7, 8], [4, 5, 6, 7, 8, 9, 3, 4]]
    alone = [new_tokens(model, batch(model, [row]), 5)[0] for row in rows]
    inputs = batch(model, PLAIN, padding="left")
    new = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29]])
    shown = torch.ones_like(new)
    shown[1, 0] = shown[2, 2] = shown[2, 0] = 0
    mask = torch.cat([inputs["attention_mask"], shown], dim=1)
    with compiled_eagerly(model, Schedule()):
        for side in ("left", "right"):
            assert new_tokens(model, batch(model, rows, padding=side), 5) == alone
        cache = model(**inputs).past_key_values
        found = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    for row, words in enumerate(PLAIN):
        real = shown[row].bool()
        text = [*words, *new[row][real].tolist()]
        wanted = model(**batch(model, [text])).logits[0, -int(real.sum()) :]
        torch.testing.assert_close(found[row][real], wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.families
def test_bounds_of_a_step_hold_where_transformers_has_them() -> None:
    """In a prompt, and not for one token behind it."""
    model = tiny_backbone("bamba_bounded")
    inputs = batch(model, WORDS, padding="left")
    wanted, answers = model(**inputs).logits, new_tokens(model, inputs, 8)
    with compiled_eagerly(model, Schedule()):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], wanted[real], **CLOSE)
        assert new_tokens(model, inputs, 8) == answers


events_anywhere = pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("jamba", Schedule(inject=1, prune={1: 6, 3: 3})),
        ("jamba", Schedule(inject=2, exit=3)),
        ("nemotron_h_between", Schedule(inject=1, prune={1: 4}, exit=2)),
        ("nemotron_h_between", Schedule(inject=2, exit=3)),
    ],
    ids=str,
)


@pytest.mark.families
@events_anywhere
def test_a_training_step_is_that_of_the_layers(name: str, schedule: Schedule) -> None:
    check_a_training_step(name, schedule)


@torch.no_grad()
@pytest.mark.families
@events_anywhere
def test_events_stand_at_layers_of_any_kind(name: str, schedule: Schedule) -> None:
    model = tiny_backbone(name)
    inputs = batch(model, WORDS, padding="left")
    wanted = layerwise_rows(model, schedule, inputs)
    tokens = layerwise_tokens(model, schedule, inputs, 4)
    with compiled_eagerly(model, schedule):
        found = model(**inputs).logits
        for row, (places, run) in enumerate(wanted):
            torch.testing.assert_close(found[row, places[run.columns[-1]]], run.logits, **CLOSE)
        assert new_tokens(model, inputs, 4) == tokens


@torch.no_grad()
@pytest.mark.families
@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "nemotron_h"])
def test_compare_runs_the_layers_as_they_are(name: str) -> None:
    schedule = Schedule(inject=1, prune={2: 3}, exit=3, score="state_change")
    model = hidrop.compile(tiny_backbone(name), schedule, backend="eager")
    found = hidrop.compare(model, new_tokens=2, **batch(model, WORDS))
    assert found.reference == "loop"
    assert found.ok, str(found)


@torch.no_grad()
def test_a_layer_of_both_kinds_keeps_two_entries_in_a_cache() -> None:
    """Those of the states come behind the keys and values of all layers; they survive a choice of rows."""
    model = tiny_backbone("falcon_h1")
    inputs = batch(model, WORDS, padding="left")
    width = inputs["input_ids"].shape[1]
    with compiled_eagerly(model, Schedule(inject=2)):
        cache = model(**inputs).past_key_values
        assert [type(layer) for layer in cache.layers] == [HidropLayer] * 4 + [RecurrentLayer] * 4
        assert [layer.filled for layer in cache.layers][1:4] == [5, width, width]
        assert [layer.filled for layer in cache.layers][4:] == [5, 5, width, width]
        assert tuple(cache.layers[5].values.shape) == (3, 4, 16, 6)
        assert tuple(cache.layers[5].keys.shape) == (3, 1, 3, 64 + 2 * 2 * 6)
        chosen = torch.tensor([2, 0])
        cache.batch_select_indices(chosen)
        found = model(input_ids=torch.tensor([[30], [31]]), past_key_values=cache).logits
        for row, (before, word) in enumerate(((2, 30), (0, 31))):
            one = model(**batch(model, [WORDS[before]])).past_key_values
            alone = model(input_ids=torch.tensor([[word]]), past_key_values=one).logits
            torch.testing.assert_close(found[row], alone[0], **CLOSE)


@torch.no_grad()
@pytest.mark.families
@pytest.mark.parametrize("name", ["falcon_h1", "nemotron_h_between"])
def test_recorded_graphs_answer_alike(name: str) -> None:
    model = tiny_backbone(name)
    batches = [batch(model, PLAIN, padding="left"), batch(model, WORDS, padding="right")]
    with compiled_eagerly(model, Schedule(inject=1)):
        wanted = [new_tokens(model, inputs, 6) for inputs in batches]
    with compiled_eagerly(model, Schedule(inject=1), cuda_graphs=True):
        for _ in range(2):
            assert [new_tokens(model, inputs, 6) for inputs in batches] == wanted


@pytest.mark.families
@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "nemotron_h_between"])
def test_gradients_go_through_a_cache(name: str) -> None:
    """The loss of tokens behind a prompt, with respect to weights that the prompt's states came from."""
    model = tiny_backbone(name)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8]])
    new = torch.tensor([[21, 22, 23]])
    whole = torch.cat([inputs["input_ids"], new], dim=1)
    rows = model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
    rows[:, -3:].square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model, Schedule()):
        cache = model(**inputs, use_cache=True).past_key_values
        found = [
            model(input_ids=new, past_key_values=cache).logits
        ]  # steps of one token alone have no bounds
        torch.cat(found, dim=1).square().sum().backward()
    seen = 0
    for name_, parameter in model.named_parameters():
        if any(part in name_ for part in (".mamba.", ".mixer.")):
            seen += 1
            assert parameter.grad is not None
            apart = (parameter.grad - wanted[name_]).abs().max() / wanted[name_].abs().max()
            assert float(apart) < 1e-4, (name_, float(apart))
    assert seen


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "nemotron_h", "jamba"])
def test_generated_code_answers_as_in_eager_mode(name: str) -> None:
    schedule = Schedule(inject=1, prune={1: 4}, exit=3)
    model = tiny_backbone(name)
    inputs = batch(model, WORDS, padding="left")
    wanted = layerwise_tokens(model, schedule, inputs, 4)
    hidrop.compile(model, schedule)
    assert new_tokens(model, inputs, 4) == wanted
    assert not runtime_in(model).programs.log.fallbacks


@pytest.mark.parametrize(
    ("name", "schedule", "error", "message"),
    [
        (
            "falcon_h1",
            Schedule(cache="snapkv(window=2,capacity=4)"),
            hidrop.UnsupportedModelError,
            r"has recurrent states \(layers 0, 1, 2, 3\), which have seen them",
        ),
        (
            "falcon_h1",
            Schedule(reads=(1,)),
            hidrop.UnsupportedModelError,
            r"reads=.*has recurrent states \(layers 1\)",
        ),
        (
            "nemotron_h_between",
            Schedule(prune={2: 2}),
            hidrop.ScheduleError,
            r"prune layer 2 scores by 'last_token'.*has MLPs alone there; layers 1 attend",
        ),
        (
            "bamba",
            Schedule(prune={3: 2}),
            hidrop.ScheduleError,
            r"prune layer 3 scores by 'last_token'.*has recurrent states there; layers 1, 2 attend",
        ),
    ],
    ids=str,
)
def test_what_such_layers_cannot_do_is_refused(
    name: str, schedule: Schedule, error: type[Exception], message: str
) -> None:
    model = tiny_backbone(name)
    with pytest.raises(error, match=message):
        hidrop.compile(model, schedule, backend="eager")
    assert not hidrop.is_compiled(model)
