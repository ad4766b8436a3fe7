"""What hooks or wraps the token embedding sees what Hugging Face shows it: the batch's own ids, once, in its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import hidrop_fx as hidrop
from hidrop_fx.runtime.embedding import looks_up_rows, within_table
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import IMAGE, IMAGE_TOKEN, batch, supervised, tiny_llava
from tests.support.trainers import trainer

ROWS = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 10]]
SCHEDULE = "inject=1,prune=1:6"

Change = Callable[[Any], Any]
"""Puts something on the embedding of a model; returns what forwards are called on."""


def compiled_and_plain(
    change: Change, schedule: str = "identity", **options: Any
) -> tuple[Any, Any]:
    """Two equal models, changed alike; the first is compiled, before the change if `late`."""
    late = options.pop("late", False)
    found = []
    for ours in (True, False):
        model = tiny_llava(num_layers=2)
        if ours and late:
            hidrop.compile(model, schedule, backend="eager", **options)
        changed = change(model)
        if ours and not late:
            hidrop.compile(model, schedule, backend="eager", **options)
        found.append(changed)
    return found[0], found[1]


def table(model: Any) -> Any:
    return model.get_input_embeddings()


# What a hook sees.


class Seen:
    """A record of the calls of a module: ids or shape, dtype and mode."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls.append((args[0].tolist(), tuple(output.shape), output.dtype, module.training))


@pytest.mark.parametrize(("late", "graphs"), [(False, True), (True, False)])
def test_a_hook_sees_the_calls_that_hugging_face_makes(late: bool, graphs: bool) -> None:
    seen: list[Seen] = []

    def change(model: Any) -> Any:
        seen.append(Seen())
        table(model).register_forward_hook(seen[-1].hook)
        return model

    for model in compiled_and_plain(change, late=late, cuda_graphs=graphs):
        inputs = supervised(model, ROWS)
        labels = inputs.pop("labels")
        model.train()(**inputs, labels=labels)
        model.eval()
        inputs = batch(model, ROWS, padding="left")
        with torch.no_grad():
            model(**inputs)
            model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
            cache = model(**inputs).past_key_values
            new = torch.tensor([[11, 12], [13, 14]])
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
            model(input_ids=new, attention_mask=mask, past_key_values=cache)
    ours, theirs = (found.calls for found in seen)
    assert len(theirs) == 7
    assert ours == theirs


def test_the_text_is_embedded_before_the_images() -> None:
    """Both may draw random numbers."""
    order: list[list[str]] = []

    def change(model: Any) -> Any:
        seen: list[str] = []
        order.append(seen)
        table(model).register_forward_hook(lambda *_: seen.append("text"))
        model.model.vision_tower.register_forward_hook(lambda *_: seen.append("images"))
        return model

    for model in compiled_and_plain(change):
        model(**batch(model, ROWS))
    assert order == [["text", "images"]] * 2


def along_columns(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + torch.arange(output.shape[1])[:, None] / 10


def by_length(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * output.shape[1] ** 0.5


def by_place(module: nn.Module, args: Any) -> Any:
    """Another word at every third column, as a perturbation of tokens has it."""
    ids = args[0].clone()
    ids[:, ::3] = torch.where(ids[:, ::3] == IMAGE_TOKEN, ids[:, ::3], 4)
    return (ids,)


def hooked(kind: str) -> Change:
    def change(model: Any) -> Any:
        if kind == "output by column":
            table(model).register_forward_hook(along_columns)
        elif kind == "output by length":
            table(model).register_forward_hook(by_length)
        elif kind == "ids by place":
            table(model).register_forward_pre_hook(by_place)
        elif kind == "gradient by column":
            table(model).register_full_backward_hook(_scaled_gradient)
            table(model).register_forward_hook(along_columns)
        elif kind == "forward of the object":
            forward = table(model).forward
            table(model).forward = lambda ids: by_length(table(model), None, forward(ids))
        return model

    return change


def _scaled_gradient(module: nn.Module, given: Any, made: Any) -> Any:
    assert made[0].dim() == 3
    return tuple(None if g is None else 2 * g for g in given) or None


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


class Positioned(nn.Module):
    """A replacement with a table inside, and no weight of its own."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.inner = inner
        self.offsets = nn.Parameter(torch.linspace(-1, 1, 64)[:, None].repeat(1, 32))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.inner(ids)
        return found + self.offsets[: ids.shape[1]]


def replaced(kind: str) -> Change:
    def change(model: Any) -> Any:
        old = table(model)
        if kind == "scaled":
            new: Any = Scaled(*old.weight.shape)
            new.weight = old.weight
        elif kind == "positioned":
            new = Positioned(old)
        else:
            options = {
                "renormalised": {"max_norm": 3.0},
                "by frequency": {"scale_grad_by_freq": True},
                "padded": {"padding_idx": 0},
            }[kind]
            new = nn.Embedding(*old.weight.shape, **options)
            new.weight = old.weight
        model.set_input_embeddings(new)
        return model

    return change


CHANGES: dict[str, Change] = {
    name: hooked(name)
    for name in (
        *("output by column", "output by length", "ids by place", "gradient by column"),
        "forward of the object",
    )
} | {
    name: replaced(name)
    for name in ("scaled", "positioned", "renormalised", "by frequency", "padded")
}


@pytest.mark.parametrize("kind", CHANGES)
def test_training_with_a_changed_embedding_is_that_of_hugging_face(kind: str) -> None:
    found = []
    for model in compiled_and_plain(CHANGES[kind]):
        inputs = supervised(model, ROWS, first_column=False)
        found.append(step(model.train(), inputs))
        if kind == "renormalised":
            found[-1][1]["weight itself"] = table(model).weight.detach().clone()
    (loss, gradients), (expected, theirs) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients, theirs)


def most_slow(kinds: Iterable[str], *fast: str) -> list[Any]:
    """Leave all but a few cases to the slow run: each captures two models."""
    return [pytest.param(k, marks=[] if k in fast else pytest.mark.slow) for k in kinds]


@pytest.mark.parametrize("kind", most_slow(CHANGES, "output by column", "positioned"))
def test_answers_with_a_changed_embedding_are_those_of_hugging_face(kind: str) -> None:
    ours, theirs = compiled_and_plain(CHANGES[kind])
    inputs = batch(theirs, ROWS, padding="left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert (
        ours.generate(**inputs, **options).tolist() == theirs.generate(**inputs, **options).tolist()
    )


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_embedding_is_asked_for_whole_columns(kind: str) -> None:
    assert looks_up_rows(table(tiny_llava(num_layers=1)))
    model = CHANGES[kind](tiny_llava(num_layers=1))
    assert looks_up_rows(table(model)) is (kind == "padded")


@pytest.fixture
def global_hook() -> Iterator[Seen]:
    seen = Seen()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Embedding) and module.num_embeddings == IMAGE_TOKEN + 1:
            seen.hook(module, args, output)

    handle = nn_module.register_module_forward_hook(hook)
    yield seen
    handle.remove()


def test_a_hook_on_all_modules_sees_whole_columns(global_hook: Seen) -> None:
    model: Any = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager")
    inputs = batch(model, ROWS)
    model(**inputs)
    assert [call[0] for call in global_hook.calls] == [inputs["input_ids"].tolist()]


def test_a_hook_that_changes_the_length_is_refused() -> None:
    model: Any = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager")
    table(model).register_forward_hook(lambda m, a, output: torch.cat([output[:, :1], output], 1))
    with pytest.raises(
        hidrop.InputError, match=r"embedding .* returned \[2, 14, 32\].*inputs_embeds"
    ):
        model(**batch(model, ROWS))


# NEFTune.


def test_neftune_in_trainer_trains_as_on_the_plain_model(tmp_path: Path) -> None:
    losses = []
    for compiled in (True, False):
        model: Any = tiny_llava(num_layers=2)
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        torch.manual_seed(0)
        found = trainer(model, tmp_path, callback=False, max_steps=3, neftune_noise_alpha=15.0)
        found.train()
        losses.append([e["loss"] for e in found.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("schedule", ["identity", SCHEDULE, "inject=1,exit=2"])
def test_neftune_draws_the_noise_of_the_whole_row(schedule: str) -> None:
    """Its size goes with the length of a row, images and padding included."""
    from transformers.integrations.neftune import activate_neftune

    noise = []

    def measure(module: nn.Module, args: Any, output: Tensor) -> None:
        noise.append((output - module.weight[args[0]]).detach())

    for model in compiled_and_plain(lambda model: model, schedule):
        handle = activate_neftune(model, 5.0)
        table(model).register_forward_hook(measure)
        torch.manual_seed(3)
        model.train()(**supervised(model, ROWS))
        handle.remove()
    torch.testing.assert_close(*noise)
    length, width = noise[0].shape[1:]
    assert float(noise[0].abs().max()) == pytest.approx(5 / (length * width) ** 0.5, rel=0.02)


# Embeddings that are given.


@pytest.mark.parametrize("kind", ["neftune", "output by length", "scaled", "plain"])
def test_placeholders_among_embeddings_are_found(kind: str) -> None:
    """By the vector of the table, as of a lookup without hooks, or by the one that the embedding gives."""
    from transformers.integrations.neftune import activate_neftune

    model: Any = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager").train()
    inputs = batch(model, ROWS)
    if kind == "neftune":
        activate_neftune(model, 5.0)
        embeds = nn.functional.embedding(inputs["input_ids"], table(model).weight)
        expected = None
    else:
        if kind == "scaled":
            replaced("scaled")(model)
        elif kind != "plain":
            table(model).register_forward_hook(lambda m, a, output: output * 2)
        embeds = table(model)(inputs["input_ids"])
        expected = model(**inputs, use_cache=False).logits
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    found = model(**given, inputs_embeds=embeds, use_cache=False).logits
    assert hidrop.inspect(model)
    if expected is not None:
        torch.testing.assert_close(found, expected)


def test_given_embeddings_call_a_hooked_table_no_more_often_than_hugging_face() -> None:
    seen: list[Seen] = []

    def change(model: Any) -> Any:
        seen.append(Seen())
        table(model).register_forward_hook(seen[-1].hook)
        return model

    for model in compiled_and_plain(change):
        inputs = batch(model, ROWS)
        embeds = nn.functional.embedding(inputs.pop("input_ids"), table(model).weight)
        model(**inputs, inputs_embeds=embeds)
    assert len(seen[0].calls) <= len(seen[1].calls) == 1


# PEFT.


def peft_changes() -> dict[str, Callable[[Any, Any], Any]]:
    def tokens(peft: Any, model: Any) -> Any:
        config = peft.TrainableTokensConfig(
            token_indices=[5, 6, 9], target_modules=["embed_tokens"], init_weights=False
        )
        return peft.get_peft_model(model, config)

    def saved(peft: Any, model: Any) -> Any:
        config = peft.LoraConfig(
            r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["embed_tokens"]
        )
        return peft.get_peft_model(model, config)

    def lora_with_tokens(peft: Any, model: Any) -> Any:
        config = peft.LoraConfig(
            r=2,
            target_modules=r".*language_model.*q_proj",
            trainable_token_indices={"embed_tokens": [5, 7]},
        )
        return peft.get_peft_model(model, config)

    def lora_embedding(peft: Any, model: Any) -> Any:
        config = peft.LoraConfig(
            r=2,
            target_modules=["embed_tokens"],
            init_lora_weights=False,
        )
        return peft.get_peft_model(model, config)

    def prompt(peft: Any, model: Any) -> Any:
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            token_dim=32,
            num_layers=2,
            num_attention_heads=4,
        )
        return peft.get_peft_model(model, config)

    return {
        "trainable tokens": tokens,
        "modules to save": saved,
        "LoRA with tokens": lora_with_tokens,
        "LoRA of the embedding": lora_embedding,
        "prompt tuning": prompt,
    }


@pytest.mark.parametrize("kind", peft_changes())
def test_peft_on_the_embedding_trains_as_on_the_plain_model(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")

    def change(model: Any) -> Any:
        torch.manual_seed(1)
        adapted = peft_changes()[kind](peft, model)
        assert any(p.requires_grad for p in adapted.parameters())
        return adapted

    found = []
    for model in compiled_and_plain(change):
        inputs = supervised(model.get_base_model(), ROWS, first_column=False)
        found.append(step(model.train(), inputs))
        assert found[-1][1]
    (loss, gradients), (expected, theirs) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients, theirs)


@pytest.mark.parametrize("kind", most_slow(peft_changes(), "prompt tuning"))
def test_peft_on_the_embedding_answers_as_on_the_plain_model(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")

    def change(model: Any) -> Any:
        torch.manual_seed(1)
        return peft_changes()[kind](peft, model).eval()

    ours, theirs = compiled_and_plain(change)
    inputs = batch(theirs.get_base_model(), ROWS, padding="left")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**inputs).logits[:, -1], theirs(**inputs).logits[:, -1], rtol=1e-4, atol=1e-4
        )
        found = [model.generate(**inputs, **options).tolist() for model in (ours, theirs)]
    assert found[0] == found[1]


def test_ids_are_those_of_the_whole_table_where_zero3_has_emptied_it() -> None:
    """As DeepSpeed leaves a parameter between the calls of its module; id 9 stands for a place of an image."""
    embedding = nn.Embedding(6, 4)
    ids = torch.tensor([[0, 5, 9, 1]])
    assert within_table(embedding, ids, [5]) is ids
    embedding.weight.ds_id, embedding.weight.ds_shape = 0, embedding.weight.shape
    embedding.weight.data = torch.empty(0)
    assert within_table(embedding, ids, [5]) is ids
    assert within_table(embedding, ids, [9]).tolist() == [[0, 5, 0, 1]]
