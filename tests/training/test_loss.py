"""The loss of a compiled model in training: transformers' own, with all of its arguments, on the rows that reach the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import hidrop_fx as hidrop
from tests.support.models import IMAGE, PRUNED, batch, random_labels, supervised, tiny_llava
from tests.support.reference import IGNORE, reference_logits, reference_rows

ROWS = [[5, 6, IMAGE, 7, 8, 9, 10], [11, IMAGE, 12, 13, IMAGE, 14, 15], [16, 17, 18, 19]]


@pytest.fixture(scope="module")
def _trained() -> Any:
    return hidrop.compile(tiny_llava(num_layers=4), PRUNED, backend="eager").train()


@pytest.fixture
def model(_trained: Any) -> Iterator[Any]:
    yield _trained.train()
    _trained.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """Under the identity schedule, and not compiled."""
    ours = hidrop.compile(tiny_llava(num_layers=2), "identity", backend="eager")
    return ours.train(), tiny_llava(num_layers=2).train()


def reference_terms(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Negative log-likelihood of every supervised token."""
    logits = reference_logits(model, hidrop.Schedule.parse(PRUNED), inputs)
    labels = inputs["labels"][:, 1:]
    return cross_entropy(
        logits[:, :-1][labels != IGNORE], labels[labels != IGNORE], reduction="none"
    )


def test_the_loss_is_the_mean_over_supervised_tokens(model: Any) -> None:
    inputs = supervised(model, ROWS)
    torch.testing.assert_close(model(**inputs).loss, reference_terms(model, inputs).mean())


@pytest.mark.parametrize("items", [torch.tensor(11), 11])
def test_num_items_in_batch_replaces_the_count(model: Any, items: Any) -> None:
    inputs = supervised(model, ROWS)
    loss = model(**inputs, num_items_in_batch=items).loss
    torch.testing.assert_close(loss, reference_terms(model, inputs).sum() / 11)


def test_shift_labels_are_taken_as_they_are(model: Any) -> None:
    inputs = supervised(model, ROWS)
    shifted = pad(inputs["labels"], (0, 1), value=IGNORE)[:, 1:]
    loss = model(**inputs).loss
    other = inputs | {"labels": torch.full_like(shifted, 3)}  # transformers does not look at these
    torch.testing.assert_close(model(**other, shift_labels=shifted).loss, loss, rtol=0, atol=0)


def test_ignore_index_of_the_caller_is_followed(model: Any) -> None:
    inputs = supervised(model, ROWS)
    loss = model(**inputs).loss
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == IGNORE, -7)
    torch.testing.assert_close(model(**inputs, ignore_index=-7).loss, loss, rtol=0, atol=0)


def test_a_loss_function_that_shifts_by_itself_gets_its_own_arguments(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
        seen.update(given)
        return cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=IGNORE
        )

    inputs = supervised(model, ROWS)
    expected = model(**inputs).loss
    monkeypatch.setattr(type(model), "loss_function", staticmethod(loss_function), raising=False)
    torch.testing.assert_close(model(**inputs, label_weight=2).loss, expected)
    assert seen == {"label_weight": 2}


@pytest.mark.parametrize("items", [None, torch.tensor(5)])
def test_loss_without_supervised_tokens_is_that_of_hf(both: tuple[Any, Any], items: Any) -> None:
    """What transformers gives, nan or zero."""
    losses = []
    for model in both:
        inputs: dict[str, Any] = batch(model, ROWS)
        inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORE)
        inputs |= {} if items is None else {"num_items_in_batch": items}
        losses.append(model(**inputs).loss)
    torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)


def test_rows_without_labels_leave_the_loss_unchanged(model: Any) -> None:
    inputs = supervised(model, ROWS)
    inputs["labels"][1:] = IGNORE
    alone = batch(model, ROWS[:1], padding="right") | {"labels": inputs["labels"][:1, :15]}
    torch.testing.assert_close(model(**inputs).loss, model(**alone).loss)


def test_forward_returns_a_tuple_without_return_dict(model: Any) -> None:
    inputs = supervised(model, ROWS)
    loss, logits = model(**inputs, return_dict=False)[:2]
    output = model(**inputs)
    assert loss == output.loss
    assert logits.shape == output.logits.shape


def test_training_sends_text_rows_to_the_head(model: Any) -> None:
    inputs = supervised(model, ROWS)
    output = model(**inputs)
    rows = reference_rows(model, hidrop.Schedule.parse(PRUNED), inputs)
    most = max(len(row.text) for row in rows)
    assert output.logits.shape[:2] == output.logit_columns.shape == (3, most)


def test_evaluation_with_labels_gives_every_row(model: Any) -> None:
    inputs = supervised(model, ROWS)
    loss = model(**inputs).loss
    with torch.no_grad():
        output = model.eval()(**inputs)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    assert not hasattr(output, "logit_columns")
    torch.testing.assert_close(output.loss, loss)


@pytest.mark.parametrize("form", ["labels", "shift_labels", "no mask"])
def test_padding_predicts_no_token_in_training_or_evaluation(model: Any, form: str) -> None:
    """The first token of a row padded on the left has nothing that could predict it."""
    inputs = batch(model, ROWS, padding="left")
    if form == "no mask":
        inputs["input_ids"] = inputs.pop("attention_mask") * 0 + 7
        del inputs["pixel_values"]
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    inputs["labels"] = inputs["input_ids"].masked_fill(real == 0, IGNORE)
    expected = reference_terms(model, inputs)
    predicted = (real[:, :-1] != 0)[inputs["labels"][:, 1:] != IGNORE]
    if form == "shift_labels":
        inputs["shift_labels"] = pad(inputs["labels"], (0, 1), value=IGNORE)[:, 1:]
    for training in (True, False):
        with torch.no_grad():
            loss = model.train(training)(**inputs).loss
        torch.testing.assert_close(loss, expected[predicted].mean())


def test_training_without_labels_gives_every_row(model: Any) -> None:
    inputs = batch(model, ROWS)
    output = model(**inputs)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    output.logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_training_without_labels_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = hidrop.compile(tiny_llava(num_layers=4), PRUNED, backend="eager").train()
    inputs = supervised(model, ROWS)
    model(**inputs)
    inputs.pop("labels")
    with torch.no_grad():
        model(**inputs)
    assert "without labels" not in caplog.text
    model(**inputs)
    model(**inputs)
    assert caplog.text.count("training without labels") == 1


def test_embeddings_that_hold_the_images_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = hidrop.compile(tiny_llava(num_layers=4), PRUNED, backend="eager").train()
    inputs = supervised(model, ROWS)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    places = ids == model.config.image_token_id
    model(**inputs, inputs_embeds=embeds)
    assert "inputs_embeds" not in caplog.text
    inputs.pop("pixel_values")
    model(**inputs, inputs_embeds=embeds.masked_fill(places[:, :, None], 0.5))
    assert "inputs_embeds without a placeholder" in caplog.text


def test_torch_compile_around_the_model_changes_nothing(model: Any) -> None:
    inputs = supervised(model, ROWS)
    other = hidrop.compile(tiny_llava(num_layers=4), PRUNED, backend="eager").train()
    found = torch.compile(other, backend="eager")(**inputs).loss
    torch.testing.assert_close(found, model(**inputs).loss)


def test_labels_on_padding_are_refused(model: Any) -> None:
    inputs = supervised(model, ROWS)
    inputs["labels"] = inputs["input_ids"].clone()
    with pytest.raises(hidrop.InputError, match=r"labels supervise padding"):
        model(**inputs)


def test_labels_of_another_shape_are_refused(model: Any) -> None:
    inputs = supervised(model, ROWS)
    with pytest.raises(hidrop.InputError, match=r"labels have shape"):
        model(**inputs | {"labels": inputs["labels"][:, 1:]})


def test_twenty_steps_end_where_those_of_transformers_end() -> None:
    """Loss by loss, and every parameter, in fp32; text-only, one-image and two-image batches take turns."""
    ours, theirs = tiny_llava(num_layers=3), tiny_llava(num_layers=3)
    hidrop.compile(ours, "identity", backend="eager")
    losses: list[list[float]] = []
    for model in (ours.train(), theirs.train()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(20):
            rows = [ROWS[:1], ROWS[1:2], ROWS, ROWS[2:]][step % 4]
            inputs: dict[str, Any] = batch(model, rows, padding="right", seed=step)
            labels = random_labels(inputs, seed=step, spans=4)
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-4:] != losses[0][:4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine, other, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
