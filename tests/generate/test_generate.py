"""Calling a compiled model: under the identity schedule it is HF's own model, under any other it keeps HF's manners."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.generation import new_tokens
from tests.support.models import (
    BACKBONES,
    EOS,
    IMAGE,
    PRUNED,
    Make,
    batch,
    random_labels,
    tiny_llava,
)
from tests.support.reference import reference_generate, reference_logits

Row = list[int | str]
Side = Literal["left", "right"]

ROW: Row = [5, 6, IMAGE, 7, 8, 9]
ROWS: list[Row] = [
    ROW,
    [8, IMAGE],
    [4, 5, 6, 7, 8],
    [IMAGE, 5, IMAGE, 12, 13],
]
MODELS = [
    ("llama", {}),
    ("llama", {"kv_heads": 2}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {"kv_heads": 2}),
    ("qwen2", {"sliding_window": 6}),
    ("qwen3", {"kv_heads": 2}),
]
each_model = pytest.mark.parametrize(
    ("backbone", "options"), MODELS, ids=lambda value: str(value).replace(" ", "")
)
each_schedule = pytest.mark.parametrize("schedule", ["identity", PRUNED])
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def fresh() -> Make:
    """A compiled model that the test may change."""

    def make(backbone: str = "llama", schedule: str = PRUNED, **options: Any) -> Any:
        return hidrop.compile(tiny_llava(backbone, **options), schedule, backend="eager")

    return make


def all_image_features(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)


# The identity schedule is HF.


@each_model
@torch.no_grad()
def test_identity_logits_are_bit_equal_to_hf(
    plain: Make, compiled: Make, backbone: str, options: dict[str, Any]
) -> None:
    hf, model = plain(backbone, **options), compiled(backbone, "identity", **options)
    batches: list[list[Row]] = [[ROW], [ROW, [4, IMAGE, 3, 9, 8, 20]], [[3, 4, 5, 6]]]
    for rows in batches:
        inputs = batch(hf, rows)
        assert torch.equal(model(**inputs).logits, hf(**inputs).logits)
        without_mask = {k: v for k, v in inputs.items() if k != "attention_mask"}
        assert torch.equal(model(**without_mask).logits, hf(**without_mask).logits)


@each_model
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_identity_logits_are_those_of_hf_where_padded(
    plain: Make, compiled: Make, backbone: str, options: dict[str, Any], padding: Side
) -> None:
    hf, model = plain(backbone, **options), compiled(backbone, "identity", **options)
    inputs = batch(hf, ROWS, padding=padding, pad_to=25)
    real = inputs["attention_mask"].bool()
    ours, theirs = model(**inputs).logits, hf(**inputs).logits
    torch.testing.assert_close(ours[real], theirs[real], **CLOSE)
    assert not ours[~real].any()


@each_model
@pytest.mark.parametrize("rows", [[ROW], [ROW, [4, IMAGE, 3, 9, 8, 20]], ROWS], ids=len)
def test_identity_generates_what_hf_generates(
    plain: Make, compiled: Make, backbone: str, options: dict[str, Any], rows: Any
) -> None:
    hf, model = plain(backbone, **options), compiled(backbone, "identity", **options)
    inputs = batch(hf, rows, padding="left")
    assert new_tokens(model, inputs) == new_tokens(hf, inputs)


def test_identity_with_beams_is_hf(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    for options in ({"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}):
        inputs = batch(hf, ROWS, padding="left")
        assert new_tokens(model, inputs, **options) == new_tokens(hf, inputs, **options)


def test_identity_samples_as_hf_from_the_same_seed(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, ROWS, padding="left")
    samples = []
    for each in (hf, model):
        torch.manual_seed(7)
        options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2}
        samples.append(new_tokens(each, inputs, **options))
    assert samples[0] == samples[1]


def test_identity_loss_and_gradients_are_those_of_hf(fresh: Make) -> None:
    hf, model = tiny_llava("qwen2"), fresh("qwen2", "identity")
    inputs = batch(hf, ROWS, padding="right")
    inputs["labels"] = random_labels(inputs)
    for arguments in ({}, {"num_items_in_batch": 3}):
        losses = [each(**inputs, **arguments).loss for each in (hf, model)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        for each, loss in zip((hf, model), losses, strict=True):
            each.zero_grad(set_to_none=True)
            loss.backward()
        theirs = dict(hf.named_parameters())
        for name, parameter in model.named_parameters():
            expected = theirs[name].grad
            if expected is None:
                assert parameter.grad is None or not parameter.grad.any(), name
            else:
                assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-5), name


def test_backward_reaches_all_that_computes(fresh: Make) -> None:
    model = fresh()
    inputs = batch(model, ROWS, padding="right")
    model(**inputs, labels=random_labels(inputs)).loss.backward()
    decoder = dict(model.model.language_model.named_parameters(prefix="decoder"))
    projector = dict(model.model.multi_modal_projector.named_parameters(prefix="projector"))
    for name, parameter in (decoder | projector).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_train_mode_and_back_gives_the_same_logits(fresh: Make) -> None:
    """Each mode has its own capture: dropout is in one of them only."""
    model = fresh("llama", "identity")
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    inputs = batch(model, [ROW])
    before = model(**inputs).logits
    model.train()
    noisy = model(**inputs)
    assert noisy.past_key_values is None or noisy.past_key_values.get_seq_length() == 14
    assert not torch.allclose(noisy.logits, before)
    model.eval()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_bfloat16_is_close_to_hf(backbone: str) -> None:
    model: Any = tiny_llava(backbone, dtype=torch.bfloat16)
    inputs = batch(model, ROWS, padding="left")
    real = inputs["attention_mask"].bool()
    theirs = model(**inputs).logits[real].float()
    hidrop.compile(model, "identity", backend="eager")
    ours = model(**inputs).logits
    assert ours.dtype == torch.bfloat16
    assert torch.nn.functional.mse_loss(ours[real].float(), theirs) < 1e-3 * theirs.var()
    assert len(new_tokens(model, inputs)) == 4
    hidrop.compile(model, PRUNED, backend="eager")
    assert len(new_tokens(model, inputs)[0]) == 5


def test_a_model_configured_for_eager_attention_equals_hf(compiled: Make, plain: Make) -> None:
    hf, model = plain(attn="eager"), compiled("llama", "identity", attn="eager")
    inputs = batch(hf, ROWS, padding="left")
    assert new_tokens(model, inputs) == new_tokens(hf, inputs)
    assert model.config.get_text_config()._attn_implementation == "eager"


@torch.no_grad()
def test_identity_follows_hf_where_the_mask_has_holes(plain: Make, compiled: Make) -> None:
    """Masked places in the middle of a row, and over half an image."""
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, ROWS, padding="right")
    inputs["attention_mask"][0, :4] = 0
    inputs["attention_mask"][2, 2] = 0
    real = inputs["attention_mask"].bool()
    ours, theirs = model(**inputs).logits, hf(**inputs).logits
    torch.testing.assert_close(ours[real], theirs[real], **CLOSE)


@torch.no_grad()
def test_identity_takes_the_arguments_of_the_vision_tower(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, [ROW])
    usual = hf(**inputs).logits
    expected = hf(**inputs, vision_feature_layer=-1).logits
    assert not torch.allclose(expected, usual)
    assert torch.equal(model(**inputs, vision_feature_layer=-1).logits, expected)

    full = {"vision_feature_select_strategy": "full"}
    ids = torch.tensor([[5, *[hf.config.image_token_id] * 10, 7]])
    inputs = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
    assert torch.equal(model(**inputs, **full).logits, hf(**inputs, **full).logits)


@torch.no_grad()
def test_identity_under_autocast_is_hf(plain: Make, fresh: Make) -> None:
    """Whether the first call, which captures, is inside or outside of it."""
    hf, inside, outside = plain(), fresh("llama", "identity"), fresh("llama", "identity")
    inputs = batch(hf, [ROW])
    usual = hf(**inputs).logits
    assert torch.equal(outside(**inputs).logits, usual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = hf(**inputs).logits
        assert torch.equal(inside(**inputs).logits, expected)
        assert torch.equal(outside(**inputs).logits, expected)
    assert torch.equal(inside(**inputs).logits, usual)


def test_training_after_inference_mode_gives_gradients(fresh: Make) -> None:
    model = fresh()
    inputs = batch(model, ROWS, padding="right")
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2)
        model(**inputs)
    model(**inputs, labels=random_labels(inputs)).loss.backward()
    model(**inputs).logits.sum().backward()
    expected = reference_generate(model, hidrop.Schedule.parse(PRUNED), inputs, 5)
    assert new_tokens(model, inputs) == expected


# Batches.


@each_schedule
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_gives_what_it_gives_alone(compiled: Make, schedule: str, padding: Side) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS, padding=padding, pad_to=24)
    together = new_tokens(model, inputs)
    images = iter(inputs["pixel_values"])
    for row, tokens in zip(ROWS, together, strict=True):
        alone = batch(model, [row])
        if pixels := [next(images) for item in row if item == IMAGE]:
            alone["pixel_values"] = torch.stack(pixels)
        assert new_tokens(model, alone)[0] == tokens


def test_beams_of_each_row_are_those_it_has_alone(compiled: Make) -> None:
    model = compiled()
    rows: list[Row] = [ROW, [4, 5, 6, 7, 8], [8, IMAGE]]
    inputs = batch(model, rows, padding="left")
    together = new_tokens(model, inputs, num_beams=3)
    pixels = iter(inputs["pixel_values"])
    for row, tokens in zip(rows, together, strict=True):
        alone = batch(model, [row])
        if IMAGE in row:
            alone["pixel_values"] = next(pixels)[None]
        assert new_tokens(model, alone, num_beams=3)[0] == tokens


@each_schedule
def test_a_prompt_that_ends_with_an_image_equals_the_row_alone(
    compiled: Make, schedule: str
) -> None:
    model = compiled("qwen3", schedule)
    batches: list[list[Row]] = [[[4, 5, IMAGE]], [[IMAGE]], [[IMAGE, IMAGE], [3]]]
    for rows in batches:
        inputs = batch(model, rows)
        expected = reference_generate(model, hidrop.Schedule.parse(schedule), inputs, 5)
        assert new_tokens(model, inputs) == expected


@each_schedule
def test_answers_of_other_lengths_agree_on_their_prefix(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    parsed = hidrop.Schedule.parse(schedule)
    for rows, count in (
        ([ROW], 1),
        (ROWS, 1),
        ([[3, 4, 5]], 3),
        ([[3]], 2),
        ([[*range(3, 60), IMAGE, 4]], 4),
        (ROWS, 7),
        ([ROW, ROW], 2),
    ):
        inputs = batch(model, rows)
        expected = reference_generate(model, parsed, inputs, count)
        assert new_tokens(model, inputs, max_new_tokens=count) == expected


@each_schedule
def test_text_without_images_is_hf_under_any_schedule(
    compiled: Make, plain: Make, schedule: str
) -> None:
    hf, model = plain(), compiled("llama", schedule)
    inputs = batch(hf, [[3, 4, 5, 6, 7], [8, 9]])
    assert new_tokens(model, inputs) == new_tokens(hf, inputs)


@each_schedule
def test_generation_stops_at_the_end_token(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    endless = new_tokens(model, inputs, max_new_tokens=8)
    end = endless[0][2]
    expected = []
    for tokens in endless:
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        expected.append(tokens[:stop])
    longest = max(map(len, expected))
    padded = [tokens + [0] * (longest - len(tokens)) for tokens in expected]
    assert new_tokens(model, inputs, max_new_tokens=8, eos_token_id=end) == padded
    (alone,) = new_tokens(model, batch(model, [ROW]), max_new_tokens=8, eos_token_id=[EOS, end])
    assert end not in alone[:-1]


# What generate and forward return.


@each_schedule
def test_scores_and_logits_of_generate_hold_together(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    output = model.generate(
        **inputs,
        **GREEDY,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(output.scores) == len(output.logits) == new.shape[1] == 4
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        assert scores.shape == logits.shape == (len(ROWS), model.config.text_config.vocab_size)
        assert torch.equal(logits.argmax(-1), new[:, step])
        assert torch.equal(scores, logits)
    assert isinstance(output.past_key_values, HidropCache)
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    "schedule", ["identity", PRUNED, "inject=1,prune=1:6+2:3,exit=3,positions=compact"]
)
@torch.no_grad()
def test_logits_to_keep_are_the_last_of_all_logits(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, [ROW, [4, IMAGE, 3, 9, 8, 20]])
    full = model(**inputs).logits
    for count in (1, 2, 5, 14):
        some = model(**inputs, logits_to_keep=count).logits
        torch.testing.assert_close(some, full[:, -count:], **CLOSE)
    for places in (torch.tensor([13]), torch.tensor([0, 3, 12])):
        some = model(**inputs, logits_to_keep=places).logits
        torch.testing.assert_close(some, full[:, places], **CLOSE)
    places = torch.tensor([[13, 2], [0, 13]])
    some = model(**inputs, logits_to_keep=places).logits
    assert some.shape[:2] == (2, 2)
    torch.testing.assert_close(some, torch.stack([full[b, places[b]] for b in (0, 1)]), **CLOSE)


@torch.no_grad()
def test_logits_to_keep_under_identity_are_those_of_hf(compiled: Make, plain: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, [ROW, [4, IMAGE, 3, 9, 8, 20]])
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[0, [1, 5]] = mask[1, 13] = True
    for keep in (0, 1, 3, torch.tensor([2, 5]), torch.tensor([[13, 2], [0, 13]]), mask):
        ours, theirs = (each(**inputs, logits_to_keep=keep).logits for each in (model, hf))
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("schedule", ["identity", PRUNED, PRUNED + ",positions=compact"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_continuing_by_hand_gives_the_logits_of_generate(
    compiled: Make, schedule: str, padding: Side
) -> None:
    """One token, then several at once, give the logits that the reference's decode gives."""
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS, padding=padding)
    expected = model.generate(
        **inputs, **GREEDY, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    assert expected.sequences[:, inputs["input_ids"].shape[1] :].tolist() == reference_generate(
        model, hidrop.Schedule.parse(schedule), inputs, 5
    )
    new = expected.sequences[:, inputs["input_ids"].shape[1] :]
    mask = inputs["attention_mask"]

    cache = model(**inputs).past_key_values
    for first, last in ((0, 1), (1, 4)):
        mask = torch.cat([mask, mask.new_ones(len(ROWS), last - first)], dim=1)
        output = model(input_ids=new[:, first:last], attention_mask=mask, past_key_values=cache)
        assert output.past_key_values is cache
        for step in range(first, last):
            torch.testing.assert_close(
                output.logits[:, step - first], expected.logits[step + 1], **CLOSE
            )
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("rows", [[ROW], ROWS], ids=len)
@torch.no_grad()
def test_continuing_with_generate_gives_the_tokens_of_one_call(compiled: Make, rows: Any) -> None:
    """A later turn of text, handed over as transformers wants it: all ids, and the cache."""
    model = compiled()
    inputs = batch(model, rows, padding="left")
    whole = model.generate(**inputs, **GREEDY, max_new_tokens=6)
    first = model.generate(**inputs, **GREEDY, max_new_tokens=3, return_dict_in_generate=True)
    mask = inputs["attention_mask"]
    second = model.generate(
        input_ids=first.sequences,
        attention_mask=torch.cat([mask, mask.new_ones(len(mask), 3)], dim=1),
        past_key_values=first.past_key_values,
        **GREEDY,
        max_new_tokens=3,
    )
    assert second.tolist() == whole.tolist()


@each_schedule
@torch.no_grad()
def test_forward_without_a_cache_equals_forward_with_one(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    output = model(**inputs, use_cache=False)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, model(**inputs).logits, **CLOSE)


def test_generate_without_a_cache_is_hf_under_identity(compiled: Make, plain: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, [ROW])
    assert new_tokens(model, inputs, use_cache=False) == new_tokens(hf, inputs)


@each_schedule
@torch.no_grad()
def test_image_features_made_beforehand_give_the_same_logits(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    features = all_image_features(model, inputs)
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    output = model(**without, mm_encoder_outputs={"image": features})
    expected = model(**inputs)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.image_hidden_states, torch.cat(list(features.pooler_output)))
    assert torch.equal(expected.image_hidden_states, output.image_hidden_states)


@each_schedule
@torch.no_grad()
def test_embeddings_in_place_of_ids_give_the_same_logits(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    output = model(**rest, inputs_embeds=embeds)
    assert torch.equal(output.logits, model(**inputs).logits)


@each_schedule
def test_generating_from_embeddings_gives_the_same_tokens(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    output = model.generate(**rest, inputs_embeds=embeds, **GREEDY, max_new_tokens=5)
    assert output.tolist() == new_tokens(model, inputs)


@each_schedule
@torch.no_grad()
def test_the_base_model_returns_the_full_length(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS, padding="right")
    output = model.model(**inputs)
    assert output.last_hidden_state.shape == (
        *inputs["input_ids"].shape,
        model.config.text_config.hidden_size,
    )
    torch.testing.assert_close(
        model.lm_head(output.last_hidden_state),
        reference_logits(model, hidrop.Schedule.parse(schedule), inputs),
        **CLOSE,
    )
    as_tuple = model.model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


@torch.no_grad()
def test_a_tuple_is_returned_on_request(compiled: Make, plain: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, [ROW])
    theirs, ours = (each(**inputs, return_dict=False) for each in (hf, model))
    assert isinstance(ours, tuple)
    assert len(ours) == len(theirs)
    assert torch.equal(ours[0], theirs[0])
    labels = random_labels(inputs)
    theirs, ours = (each(**inputs, labels=labels, return_dict=False) for each in (hf, model))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].shape == theirs[1].shape


@torch.no_grad()
def test_positional_arguments_of_forward_are_taken(compiled: Make) -> None:
    model = compiled()
    inputs = batch(model, [ROW])
    by_position = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    assert torch.equal(by_position.logits, model(**inputs).logits)


def test_hooks_on_the_model_go_on_working(fresh: Make) -> None:
    model, calls = fresh(), []
    model.register_forward_hook(lambda *args: calls.append("model"))
    model.model.multi_modal_projector.register_forward_hook(lambda *args: calls.append("projector"))
    model(**batch(model, [ROW]))
    assert calls == ["projector", "model"]


# What compile and restore do to the object.


def attributes(model: Any) -> tuple[set[str], set[str]]:
    return set(model.__dict__), set(model.model.__dict__)


@torch.no_grad()
def test_restore_gives_back_hf(plain: Make) -> None:
    hf = plain()
    model: Any = tiny_llava()
    before = attributes(model)
    inputs = batch(hf, ROWS)
    assert hidrop.compile(model, PRUNED, backend="eager") is model
    assert hidrop.is_compiled(model)
    model.generate(**inputs, max_new_tokens=2)
    model(**inputs)
    assert hidrop.restore(model) is model
    assert not hidrop.is_compiled(model)
    assert attributes(model) == before
    assert model.forward.__func__ is type(model).forward
    assert model.model.forward.__func__ is type(model.model).forward
    assert inspect.signature(model.forward) == inspect.signature(hf.forward)
    assert torch.equal(model(**inputs).logits, hf(**inputs).logits)
    assert new_tokens(model, inputs) == new_tokens(hf, inputs)


def test_restore_gives_back_what_others_had_put_there() -> None:
    """accelerate, for one, keeps a forward of its own in the instance."""
    model: Any = tiny_llava()
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = forward
    hidrop.compile(model, PRUNED, backend="eager")
    assert model.forward is not forward
    hidrop.compile(model, "exit=2", backend="eager")
    hidrop.restore(model)
    assert model.forward is forward


def test_signatures_are_those_of_hf(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled()
    assert inspect.signature(model.forward) == inspect.signature(hf.forward)
    assert inspect.signature(model.model.forward) == inspect.signature(hf.model.forward)


def test_the_object_stays_a_plain_hf_model(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled()
    assert type(model) is type(hf)
    assert list(model.state_dict()) == list(hf.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in hf.named_modules()]
    assert model.config.to_dict() == hf.config.to_dict()
    assert model.generation_config == hf.generation_config


def test_compiling_again_replaces_the_schedule(fresh: Make) -> None:
    model = fresh()
    inputs = batch(model, ROWS)
    pruned = new_tokens(model, inputs)
    assert pruned == reference_generate(model, hidrop.Schedule.parse(PRUNED), inputs, 5)
    captured = [found.decoder for found in runtime_of(model).programs.captures.values()]
    hidrop.compile(model, "exit=2", backend="eager")
    shorter = new_tokens(model, inputs)
    again = [found.decoder for found in runtime_of(model).programs.captures.values()]
    assert list(map(id, again)) == list(map(id, captured)), "the decoder was captured again"
    assert shorter == reference_generate(model, hidrop.Schedule(exit=2), inputs, 5)
    hidrop.restore(model)
    assert not hidrop.is_compiled(model)


@torch.no_grad()
def test_a_copy_runs_its_own_weights(fresh: Make) -> None:
    model = fresh()
    inputs = batch(model, ROWS)
    before = model(**inputs).logits
    runtime = runtime_of(model)
    twin = copy.deepcopy(model)
    assert hidrop.is_compiled(twin)
    assert runtime_of(twin) is not runtime
    assert torch.equal(twin(**inputs).logits, before)

    twin.model.language_model.layers[3].mlp.down_proj.weight.mul_(3)
    twin.lm_head.weight.mul_(2)
    changed = twin(**inputs).logits
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(
        changed, reference_logits(twin, hidrop.Schedule.parse(PRUNED), inputs), **CLOSE
    )
    assert torch.equal(model(**inputs).logits, before)
    assert runtime_of(model) is runtime

    hidrop.restore(twin)
    assert hidrop.is_compiled(model)
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_changed_weights_are_used(fresh: Make) -> None:
    model = fresh()
    inputs = batch(model, ROWS)
    model(**inputs)
    weights = model.model.language_model.layers
    weights[2].mlp.down_proj.weight.mul_(3)
    weights[1].self_attn.q_proj.weight = torch.nn.Parameter(weights[1].self_attn.q_proj.weight * 2)
    torch.testing.assert_close(
        model(**inputs).logits,
        reference_logits(model, hidrop.Schedule.parse(PRUNED), inputs),
        **CLOSE,
    )


def test_save_pretrained_and_from_pretrained_keep_the_answers(
    compiled: Make, plain: Make, tmp_path: Any
) -> None:
    hf, model = plain(), compiled()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not hidrop.is_compiled(loaded)
    weights = hf.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name]), name
    inputs = batch(hf, ROWS)
    assert new_tokens(loaded, inputs) == new_tokens(hf, inputs)


def test_generate_still_checks_its_arguments(compiled: Make) -> None:
    model = compiled()
    inputs = batch(model, [ROW])
    with pytest.raises(ValueError, match=r"not used by the model.*no_such_argument"):
        model.generate(**inputs, max_new_tokens=2, no_such_argument=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(**inputs, max_new_tokens=0)
    assert len(new_tokens(model, inputs)[0]) == 5
