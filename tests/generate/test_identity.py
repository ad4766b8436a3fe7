"""The identity schedule is Hugging Face: logits, tokens, loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.generation import new_tokens, repeated_together
from tests.support.models import (
    BACKBONES,
    IMAGE,
    PRUNED,
    Make,
    batch,
    random_labels,
    tiny_llava,
)
from tests.support.prompts import CLOSE, ROW, ROWS, Row, Side
from tests.support.reference import reference_generate

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
        inputs = batch(hf, repeated_together(ROWS, IMAGE), padding="left")
        assert new_tokens(model, inputs, **options) == new_tokens(hf, inputs, **options)


def test_identity_samples_as_hf_from_the_same_seed(plain: Make, compiled: Make) -> None:
    hf, model = plain(), compiled("llama", "identity")
    inputs = batch(hf, repeated_together(ROWS, IMAGE), padding="left")
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
