"""Outputs of forward and generate, and the inputs that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.generation import new_tokens
from tests.support.models import (
    IMAGE,
    PRUNED,
    Make,
    batch,
    random_labels,
)
from tests.support.prompts import CLOSE, ROW, ROWS, Side, each_schedule
from tests.support.reference import reference_generate, reference_logits

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def all_image_features(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)


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
    by_row = (torch.tensor([[13, 2], [0, 13]]), mask)  # which older transformers do not know
    known = by_row if hasattr(transformers.modeling_utils, "slice_logits_to_keep") else ()
    for keep in (0, 1, 3, torch.tensor([2, 5]), *known):
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
