"""Layers that carry a state: pads, several turns, beams, drafts, gradients, graphs, and what a schedule may not ask of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as code

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.capture.recurrences import has_known_rule, traced_recurrences
from hidrop_fx.ops.recurrence import (
    causal_recurrence,
    convolution_behind,
    last_inputs,
    prompt_recurrence,
    recurrence_over,
)
from hidrop_fx.runtime.kv.layer import RecurrentLayer
from tests.support.backbones import tiny_backbone
from tests.support.families import CASES, ROWS, make_batch
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, batch
from tests.support.runtimes import compiled_eagerly

HOME = code.__name__
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
PLAIN: list[list[int | str]] = [[5, 6, 7, 8, 9, 10, 11], [8, 11, 3], [4]]
WORDS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [8, IMAGE, 11, IMAGE, 3], [4, 5]]
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def given(tokens: int, rows: int = 3) -> list[Tensor]:
    """Queries, keys, values, decays, and shares that are written."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(rows, 2, tokens, 8, generator=generator) for _ in range(2))
    v = torch.randn(rows, 4, tokens, 6, generator=generator)
    decay = -torch.rand(rows, tokens, 4, generator=generator)
    return [q, k, v, decay, torch.rand(rows, tokens, 4, generator=generator)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, state: Tensor) -> Any:
    """The rule for one row, token by token, in float64: [H, n, e] and the state [H, d, e]."""
    unit = [(x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).double() for x in (q, k)]
    q, k = (x.repeat_interleave(2, dim=0) for x in unit)
    state, out = state.double(), []
    for t in range(q.shape[1]):
        state = state * decay[t].double().exp()[:, None, None]
        error = v[:, t].double() - torch.einsum("hd,hde->he", k[:, t], state)
        step = write[t].double()[:, None] * error
        state = state + torch.einsum("hd,he->hde", k[:, t], step)
        out.append(torch.einsum("hd,hde->he", q[:, t], state) / q.shape[2] ** 0.5)
    return torch.stack(out, dim=1).float(), state.float()


def taken(tensors: list[Tensor], row: int, places: list[int]) -> list[Tensor]:
    q, k, v, decay, write = (each[row] for each in tensors)
    return [*(x[:, places] for x in (q, k, v)), decay[places], write[places]]


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_padding_leaves_the_state_behind_a_prompt_as_it_is(tokens: int) -> None:
    """Also where a row has none but padding, and where there are more tokens than a chunk has."""
    tensors, table = given(tokens), torch.zeros(3, tokens + 4, dtype=torch.bool)
    real = [tokens, max(1, tokens - 2), 0]
    columns = torch.full((3, tokens), table.shape[1] - 1)
    for row, count in enumerate(real):
        columns[row, :count] = torch.arange(count)
    out, state = prompt_recurrence(*tensors, HOME, True, columns, table)
    empty = torch.zeros(4, 8, 6)
    for row, count in enumerate(real):
        if count:
            wanted, after = one_by_one(*taken(tensors, row, list(range(count))), empty)
            torch.testing.assert_close(out[row, :, :count], wanted, **CLOSE)
        torch.testing.assert_close(state[row], after if count else empty, **CLOSE)
    torch.testing.assert_close(causal_recurrence(*tensors, HOME, True)[0], out[0])
    inputs = last_inputs(tensors[2][:, :1], columns, table, 3)
    for row, count in enumerate(real):
        held = torch.cat([torch.zeros(3, 6), tensors[2][row, 0, :count]])[-3:]
        torch.testing.assert_close(inputs[row, 0], held)


@pytest.mark.parametrize("tokens", [1, 4])
def test_new_tokens_go_on_from_a_state_and_padding_among_them_does_not(tokens: int) -> None:
    tensors, generator = given(tokens), torch.Generator().manual_seed(7)
    state = torch.randn(3, 4, 8, 6, generator=generator)
    shown = torch.rand(3, tokens, generator=generator) < 0.6
    shown[0], shown[2] = True, False
    order, counts = (~shown).int().argsort(dim=1, stable=True), shown.sum(dim=1)
    out, after = recurrence_over(*tensors, HOME, True, state, order, counts)
    states = torch.randn(3, 1, tokens, 6, generator=generator)
    inputs = torch.randn(3, 1, 3, 6, generator=generator)
    weight = torch.randn(6, 1, 3, generator=generator)
    convolved, kept = convolution_behind(states, inputs, weight, None, order, counts)
    for row in range(3):
        places = shown[row].nonzero().flatten().tolist()
        window = torch.cat([inputs[row, 0], states[row, 0, places]])
        torch.testing.assert_close(kept[row, 0], window[-3:])
        if not places:
            torch.testing.assert_close(after[row], state[row])
            continue
        wanted, end = one_by_one(*taken(tensors, row, places), state[row])
        torch.testing.assert_close(out[row][:, places], wanted, **CLOSE)
        torch.testing.assert_close(after[row], end, **CLOSE)
        spans = window.unfold(0, 3, 1)[1:]
        torch.testing.assert_close(
            convolved[row, 0, places], (spans * weight[:, 0]).sum(-1), **CLOSE
        )
    whole = recurrence_over(*tensors, HOME, True, state, None, None)
    torch.testing.assert_close(whole[0][0], out[0], **CLOSE)


def test_the_operator_has_the_gradients_of_the_function_that_it_calls() -> None:
    def gradients(run: Any) -> list[Tensor]:
        leaves = [each.requires_grad_() for each in (*given(5), torch.ones(3, 4, 8, 6) / 7)]
        out, state = run(*leaves)
        (out.square().sum() + state.sin().sum()).backward()
        return [leaf.grad for leaf in leaves]

    def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
        read = [x.transpose(1, 2) for x in (q, k, v)]
        how = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "initial_state": state}
        return code.torch_chunk_gated_delta_rule(*read, g=g, beta=beta, **how)

    def ours(*leaves: Tensor) -> Any:
        return recurrence_over(*leaves[:5], HOME, True, leaves[5], None, None)

    for found, wanted in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_layers_of_a_decoder_are_as_before_once_it_was_traced() -> None:
    decoder = tiny_backbone("qwen3_5_text").get_decoder()
    states = torch.randn(1, 5, 32)
    mixer = decoder.layers[0].linear_attn
    before = mixer(states)
    assert [has_known_rule(layer.linear_attn) for layer in (decoder.layers[0], decoder.layers[3])]
    assert not has_known_rule(decoder.layers[1].self_attn)
    with traced_recurrences(decoder):
        assert "forward" in vars(mixer)
    assert "forward" not in vars(mixer)
    torch.testing.assert_close(mixer(states), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5_text",
        *(pytest.param(n, marks=pytest.mark.families) for n in ("qwen3_next", "olmo_hybrid")),
    ],
)
def test_pads_change_no_answer(name: str) -> None:
    model = tiny_backbone(name)
    rows: list[list[int | str]] = [[5], [7, 8], [4, 5, 6, 7, 8, 9, 3, 4]]
    alone = [new_tokens(model, batch(model, [row]), 5)[0] for row in rows]
    with compiled_eagerly(model, Schedule()):
        assert new_tokens(model, batch(model, rows, padding="left"), 5) == alone
        assert new_tokens(model, batch(model, rows, padding="right"), 5) == alone


@torch.no_grad()
@pytest.mark.slow
def test_beams_and_samples_are_hugging_face_s() -> None:
    case = CASES["qwen3_5"]
    model = case.make()
    inputs = make_batch(case, model, ROWS).inputs
    asked = ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True})

    def answers(how: dict[str, Any]) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model.generate(
            **inputs, **{"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **how}
        )
        return out

    wanted = [answers(how) for how in asked]
    with compiled_eagerly(model, Schedule()):
        for how, tokens in zip(asked, wanted, strict=True):
            assert torch.equal(answers(how), tokens), how


@torch.no_grad()
def test_the_cache_of_a_recurrent_layer_is_as_large_whatever_the_prompt() -> None:
    model = tiny_backbone("qwen3_5_text")
    inputs = batch(model, WORDS, padding="left")
    width = inputs["input_ids"].shape[1]
    with compiled_eagerly(model, Schedule(inject=2)):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )  # fmt: skip
    cache = out.past_key_values
    first, second, third, last = cache.layers
    assert [type(layer) is RecurrentLayer for layer in cache.layers] == [True, False, False, True]
    assert [layer.filled for layer in (third, last)] == [width + 2] * 2
    assert first.filled == second.filled < width
    for layer in (first, last):
        assert tuple(layer.keys.shape) == (3, 1, 3, 2 * 16 + 24)
        assert tuple(layer.values.shape) == (3, 4, 8, 6)
        assert layer.values.dtype is torch.float32
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [False, True], ids=["all_real", "padded"])
def test_several_tokens_behind_a_prompt_are_those_of_the_whole_text(hidden: bool) -> None:
    """With rows of different lengths too: padding among the new tokens is not seen, which Hugging Face's decay sees."""
    model = tiny_backbone("qwen3_5_text")
    inputs = batch(model, PLAIN, padding="left")
    new = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29]])
    shown = torch.ones_like(new)
    if hidden:
        shown[1, 0] = shown[2, 2] = shown[2, 0] = 0
    mask = torch.cat([inputs["attention_mask"], shown], dim=1)
    with compiled_eagerly(model, Schedule()):
        cache = model(**inputs).past_key_values
        found = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
        after = torch.tensor([[30], [31], [32]])
        mask = torch.cat([mask, torch.ones_like(after)], dim=1)
        following = model(input_ids=after, attention_mask=mask, past_key_values=cache).logits
    for row, words in enumerate(PLAIN):
        real = shown[row].bool()
        text = [*words, *new[row][real].tolist(), int(after[row])]
        wanted = model(**batch(model, [text])).logits[0, -1 - int(real.sum()) :]
        torch.testing.assert_close(found[row][real], wanted[:-1], **CLOSE)
        torch.testing.assert_close(following[row], wanted[-1:], **CLOSE)


@torch.no_grad()
def test_tokens_are_pruned_at_a_recurrent_layer_by_their_states() -> None:
    schedule = Schedule(inject=1, prune={3: 2}, score="state_change")
    model = hidrop.compile(tiny_backbone("qwen3_5_text"), schedule, backend="eager")
    found = hidrop.compare(model, new_tokens=3, **batch(model, WORDS))
    assert found.reference == "loop"
    assert found.ok, str(found)
    assert hidrop.explain(model, **batch(model, WORDS))


@torch.no_grad()
@pytest.mark.families
@pytest.mark.parametrize("at", [1, 2, 3])
def test_tokens_enter_and_leave_among_layers_of_which_every_fourth_attends(at: int) -> None:
    """As Qwen3.5's own layers do: events at recurrent layers, in front of the first that attends."""
    model = tiny_backbone("qwen3_5_interval")
    score = "last_token" if at == 3 else "state_change"
    schedule = Schedule(inject=at - 1, prune={at: 2}, exit=3 if at < 3 else None, score=score)
    hidrop.compile(model, schedule, backend="eager")
    found = hidrop.compare(model, new_tokens=3, **batch(model, WORDS))
    assert found.reference == "loop"
    assert found.ok, str(found)


@torch.no_grad()
def test_recorded_graphs_answer_alike_and_recording_takes_no_state_further() -> None:
    """On a CPU a recording calls the program once more, as warming up does before a CUDA graph is captured."""
    model = tiny_backbone("qwen3_5_text")
    batches = [batch(model, PLAIN, padding="left"), batch(model, PLAIN, padding="right")]
    wanted = [new_tokens(model, inputs, 6) for inputs in batches[:1]] * 2
    with compiled_eagerly(model, Schedule(), cuda_graphs=True):
        for _ in range(2):
            assert [new_tokens(model, inputs, 6) for inputs in batches] == wanted
        kept = model(**batches[0]).past_key_values
        other = model(**batch(model, [[5, 6, 7]])).past_key_values  # takes the buffers over
        ids, mask = torch.tensor([[30], [31], [32]]), batches[0]["attention_mask"]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        twin = copy.deepcopy(kept)
        found = [
            model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            for cache in (kept, twin)
        ]
    assert other is not kept
    torch.testing.assert_close(found[0], found[1])
    for row, words in enumerate(PLAIN):
        alone = model(**batch(model, [[*words, int(ids[row])]])).logits[:, -1]
        torch.testing.assert_close(found[0][row], alone, **CLOSE)


def test_gradients_go_through_a_cache() -> None:
    """The loss of tokens behind a prompt, with respect to weights that the prompt's states came from."""
    model = tiny_backbone("qwen3_5_text")
    inputs = batch(model, [[5, 6, IMAGE, 7, 8]])
    new = torch.tensor([[21, 22, 23]])
    whole = torch.cat([inputs["input_ids"], new], dim=1)
    rows = model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
    rows[:, -3:].square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model, Schedule()):
        cache = model(**inputs, use_cache=True).past_key_values
        parts = []
        for one in new.split((2, 1), dim=1):
            parts.append(model(input_ids=one, past_key_values=cache).logits)
        torch.cat(parts, dim=1).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "linear_attn" in name:
            assert parameter.grad is not None
            apart = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
            assert float(apart) < 1e-4, (name, float(apart))


@torch.no_grad()
def test_what_would_take_a_token_out_of_a_state_is_refused() -> None:
    model = tiny_backbone("qwen3_5_text")
    inputs = batch(model, WORDS, padding="left")
    new, mask = torch.tensor([[21, 22], [24, 25], [27, 28]]), inputs["attention_mask"]
    with compiled_eagerly(model, Schedule()):
        with pytest.raises(hidrop.InputError, match="prompt lookup take drafted tokens back"):
            new_tokens(model, inputs, 4, prompt_lookup_num_tokens=2)
        cache = model(**inputs).past_key_values
        shown = torch.cat([mask, torch.ones_like(new)], dim=1)
        model(input_ids=new, attention_mask=shown, past_key_values=cache)
        with pytest.raises(hidrop.HidropError, match=r"crop\(-1\).*have seen the tokens"):
            cache.crop(-1)
        hidden = torch.cat([shown, torch.ones_like(new[:, :1])], dim=1)
        hidden[1, -2] = 0
        one = new[:, :1]
        with pytest.raises(hidrop.HidropError, match=r"attention_mask hides tokens.*have seen"):
            model(input_ids=one, attention_mask=hidden, past_key_values=cache)
        hidden[1, -2] = 1
        assert (
            model(input_ids=one, attention_mask=hidden, past_key_values=cache)
            .logits.isfinite()
            .all()
        )
        assert not cache.is_croppable


@torch.no_grad()
def test_a_call_that_fails_on_the_way_leaves_no_state_that_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_backbone("qwen3_5_text")
    inputs = batch(model, [[5, 6, 7, 8]])
    with compiled_eagerly(model, Schedule()):
        cache = model(**inputs).past_key_values
        with monkeypatch.context() as patched:

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError("out of memory")

            patched.setattr(code, "torch_recurrent_gated_delta_rule", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        with pytest.raises(hidrop.HidropError, match="stand between two tokens"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        assert new_tokens(model, inputs, 2)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (
            Schedule(prune={3: 2}),
            hidrop.ScheduleError,
            r"prune layer 3 scores by 'last_token', which reads key, query, scale of layer 3.*layers 1, 2 attend",
        ),
        (
            Schedule(cache="snapkv(window=2,capacity=4)"),
            hidrop.UnsupportedModelError,
            r"LlavaForConditionalGeneration has recurrent states \(layers 0, 3\), which have seen them",
        ),
        (
            Schedule(bottleneck=5),
            hidrop.UnsupportedModelError,
            r"bottleneck=5 takes tokens out of caches.*recurrent states \(layers 0, 3\)",
        ),
        (
            Schedule(prune={2: 2}, cache="retroactive(layer=2)"),
            hidrop.UnsupportedModelError,
            r"retroactive\(layer=2,first=0\).*\(layers 0\)",
        ),
        (
            Schedule(reads=(1, 3)),
            hidrop.UnsupportedModelError,
            r"has recurrent states \(layers 3\), which attend to nothing",
        ),
    ],
    ids=str,
)
def test_what_a_recurrent_layer_cannot_do_is_refused(
    schedule: Schedule, error: type[Exception], message: str
) -> None:
    model = tiny_backbone("qwen3_5_text")
    with pytest.raises(error, match=message):
        hidrop.compile(model, schedule, backend="eager")
    assert not hidrop.is_compiled(model)


def test_another_recurrence_is_refused_by_the_type_of_its_layers() -> None:
    model = tiny_backbone("qwen3_5_text")
    decoder = model.get_decoder()
    decoder.layers[0].linear_attn = decoder.layers[3].linear_attn = nn.Identity()
    with pytest.raises(
        hidrop.UnsupportedModelError, match=r"layers of type 'linear_attention'.*gated delta rule"
    ):
        hidrop.compile(model, Schedule(), backend="eager")
