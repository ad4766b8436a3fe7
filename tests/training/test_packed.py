"""Packed batches: samples end to end in one row, each as if it stood in a row of its own.

Held against the eager reference on the padded batch, and under the identity schedule against transformers on the same call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

import hidrop_fx as hidrop
from hidrop_fx.schedule.schedule import SCORES
from tests.support.models import IMAGE, PRUNED, batch, schedules, supervised, tiny_llava
from tests.support.packed import apart, bounds, lengths_of, pack, unpadded
from tests.support.reference import IGNORE, reference_logits, reference_rows
from tests.support.runtimes import compiled_eagerly, last_layout
from tests.support.trainers import DATA, collate, options
from tests.training.test_equality import (
    AMBIGUOUS,
    HELD_ELSEWHERE,
    cases,
    compare_gradients,
    gradients_or_none,
    labelled,
    reference_loss,
)

LAYERS = 4
ROWS: list[list[int | str]] = [
    [5, 6, IMAGE, 7, 8, 9, 10],
    [11, IMAGE, 12, 13, IMAGE, 14, 15],
    [16, 17, 18, 19],
    [IMAGE, 20, 21],
]


def step(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor | None]]:
    output = model(**inputs)
    return output, gradients_or_none(model, output.loss)


@pytest.fixture(scope="module")
def trained() -> Any:
    return hidrop.compile(tiny_llava(num_layers=LAYERS), PRUNED, backend="eager").train()


@pytest.fixture
def inputs(trained: Any) -> dict[str, Tensor]:
    return supervised(trained, ROWS, first_column=False)


# Against the reference.


@pytest.mark.parametrize(
    ("backbone", "window"), [("qwen2", 6), pytest.param("llama", None, marks=pytest.mark.slow)]
)
def test_random_schedules_give_what_the_reference_gives_for_each_sample(
    backbone: str, window: int | None
) -> None:
    model = tiny_llava(backbone, num_layers=3, sliding_window=window).train()
    scores = [score for score in SCORES if score not in HELD_ELSEWHERE]
    seen = 0

    @seed(3)
    @settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
    @given(schedules(3, scores=scores), st.lists(cases(), min_size=2, max_size=2))
    def run(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        nonlocal seen
        schedule, clear = hidrop.Schedule(**arguments), 0
        with compiled_eagerly(model, schedule):
            for case in drawn:
                padded = labelled(model, case)
                known = reference_rows(model, schedule, padded)
                if len(known) < 2 or any(row.gap <= AMBIGUOUS for row in known):
                    continue
                compare(model, schedule, padded)
                clear += 1
        seen += clear
        assume(clear)

    run()
    assert seen >= 3


def compare(model: Any, schedule: hidrop.Schedule, padded: dict[str, Any]) -> None:
    first = padded["attention_mask"].argmax(dim=1, keepdim=True)
    padded["labels"] = padded["labels"].scatter(1, first, IGNORE)
    logits = reference_logits(model, schedule, padded)
    loss = reference_loss(logits, padded)
    expected = gradients_or_none(model, loss)
    output = model(**pack(padded))
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5, equal_nan=True)
    if loss.isfinite():
        compare_gradients(gradients_or_none(model, output.loss), expected)
    wanted = torch.cat(unpadded(logits, padded))[output.logit_columns[0]]
    torch.testing.assert_close(output.logits[0], wanted, rtol=1e-4, atol=1e-4)


def test_each_sample_has_its_own_images_and_budgets(
    trained: Any, inputs: dict[str, Tensor]
) -> None:
    packed = pack(inputs) | {"labels": None, "use_cache": False}
    trained(**packed)
    layout = last_layout(trained)
    assert layout.images == [1, 2, 0, 1]
    assert layout.vision_counts["prune_1"] == [6, 12, 0, 6]
    assert layout.vision_counts["prune_2"] == [3, 6, 0, 3]
    words = [n - 9 * i for n, i in zip(lengths_of(inputs), layout.images, strict=True)]
    assert layout.counts["text"] == words


# Against transformers.


@pytest.mark.parametrize(
    ("backbone", "separated"), [("llama", True), ("llama", False), ("mistral", True)]
)
def test_the_identity_schedule_gives_what_transformers_gives(
    backbone: str, separated: bool
) -> None:
    """With labels at the start of a sample, too: the last token of the one before predicts them there."""
    window = None if backbone == "llama" else 6
    model = tiny_llava(backbone, num_layers=2, sliding_window=window).train()
    packed = pack(supervised(model, ROWS, first_column=False))
    if not separated:
        packed["labels"] = packed["input_ids"].masked_fill(packed["input_ids"] > 90, IGNORE)
    output, wanted = step(model, packed | {"use_cache": False})
    with compiled_eagerly(model, "identity"):
        found, gradients = step(model, packed)
    torch.testing.assert_close(found.loss, output.loss, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients, wanted)
    columns = found.logit_columns[0]
    torch.testing.assert_close(found.logits[0], output.logits[0, columns], rtol=1e-4, atol=1e-4)


def test_the_collator_of_transformers_and_the_bounds_of_samples_tell_the_same() -> None:
    model = hidrop.compile(tiny_llava(num_layers=LAYERS), PRUNED, backend="eager").train()
    padded = collate(DATA[:4])
    loss, wanted = step(model, padded)
    for given_bounds in (False, True):
        made = DataCollatorWithFlattening(return_flash_attn_kwargs=given_bounds)
        flat = made([{k: e[k] for k in ("input_ids", "labels")} for e in DATA[:4]])
        found, gradients = step(model, flat | {"pixel_values": padded["pixel_values"]})
        torch.testing.assert_close(found.loss, loss.loss, rtol=1e-6, atol=1e-6)
        compare_gradients(gradients, wanted)


def test_the_trainer_comes_to_the_weights_of_padded_batches(tmp_path: Path) -> None:
    def flattened(examples: list[dict[str, Any]]) -> dict[str, Any]:
        flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        made = flat([{k: e[k] for k in ("input_ids", "labels")} for e in examples])
        pixels = {k: v for k, v in collate(examples).items() if k == "pixel_values"}
        return {**made, **pixels, "use_cache": False}  # with one transformers keeps nothing apart

    def weights(schedule: str | None, collator: Any) -> dict[str, Tensor]:
        model = tiny_llava(num_layers=3)
        if schedule is not None:
            hidrop.compile(model, schedule, backend="eager")
        transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**options(tmp_path, max_steps=2, optim="sgd")),
            train_dataset=DATA,
            data_collator=collator,
        ).train()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    for schedule, wanted in (
        ("identity", weights(None, flattened)),
        ("inject=1,prune=1:6+2:3", weights("inject=1,prune=1:6+2:3", collate)),
    ):
        found = weights(schedule, flattened)
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_sft_trainer_without_padding_on_samples_of_text(tmp_path: Path) -> None:
    """TRL refuses it for data sets with images, whatever the model; its loss calls the model without the head."""
    trl = pytest.importorskip("trl", reason="trl, which is no dependency, is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets, which TRL needs, is missing")
    from tests.training.test_trl import tokenizer

    data = [{"input_ids": [5 + i, *range(20, 24 + 2 * i)]} for i in range(4)]

    def weights(schedule: str | None, **changes: Any) -> dict[str, Tensor]:
        model = tiny_llava(num_layers=3)
        if schedule is not None:
            hidrop.compile(model, schedule, backend="eager")
        trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **options(tmp_path, max_steps=2, optim="sgd"),
                bf16=False,
                max_length=None,
                **changes,
            ),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer(),
        ).train()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    wanted = weights(None)
    start = dict(tiny_llava(num_layers=3).named_parameters())
    assert any(not torch.equal(value, start[name]) for name, value in wanted.items())
    for schedule in ("identity", "inject=1,prune=1:6,exit=2"):
        for loss_type in ("nll", "chunked_nll"):
            found = weights(schedule, padding_free=True, loss_type=loss_type)
            for name, value in wanted.items():
                torch.testing.assert_close(
                    found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


# The forms of a call.


def test_bounds_alone_say_where_samples_begin(trained: Any, inputs: dict[str, Tensor]) -> None:
    loss, wanted = step(trained, inputs)
    packed = pack(inputs) | bounds(inputs)
    for ids in (None, torch.arange(packed["input_ids"].shape[1])[None]):  # ids that go on
        found, gradients = step(trained, packed | {"position_ids": ids})
        torch.testing.assert_close(found.loss, loss.loss, rtol=1e-5, atol=1e-5)
        compare_gradients(gradients, wanted)


def test_several_packed_rows_and_one_token_samples(trained: Any) -> None:
    """As TRL pads packed rows: each pad is a sample, whose id is 0."""
    rows = [[5, IMAGE, 6, 7, 8], [9, 10, 11], [12, 13, IMAGE, 14], [15, 16], [17, 18]]
    padded = supervised(trained, rows, first_column=False)
    loss, wanted = step(trained, padded)
    packed = pack(padded)
    one, images = 13, packed.pop("pixel_values")  # the first sample makes a row, the others one
    two: dict[str, Any] = {}
    for name, value in packed.items():
        fill = IGNORE if name == "labels" else 0
        parts = [value[0, :one], value[0, one:]]
        two[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
    found, gradients = step(trained, two | {"pixel_values": images})
    torch.testing.assert_close(found.loss, loss.loss, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients, wanted)
    length = two["input_ids"].shape[1]
    assert found.logits.shape[:2] == found.logit_columns.shape
    counts = (found.logit_columns < length).sum(dim=1).tolist()
    layout, pads = last_layout(trained), 2 * length - packed["input_ids"].shape[1]
    assert len(layout.counts["text"]) == len(rows) + pads == 11
    assert sum(counts) == sum(layout.counts["text"])


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_without_labels_all_rows_come_back(trained: Any, training: bool) -> None:
    padded = batch(trained, ROWS, padding="left")
    packed = pack(padded) | {"use_cache": False}
    trained.train(training)
    try:
        wanted = trained(**padded, use_cache=False, output_hidden_states=True)
        found = trained(**packed, output_hidden_states=True)
        last = trained(**packed, logits_to_keep=1).logits
        base = trained.model(**packed)
    finally:
        trained.train()
    assert found.past_key_values is None
    pairs = [
        (found.logits, wanted.logits),
        *zip(found.hidden_states, wanted.hidden_states, strict=True),
    ]
    for ours, theirs in pairs:
        for a, b in zip(apart(ours, padded), unpadded(theirs, padded), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, found.logits[:, -1:], rtol=1e-4, atol=1e-4)
    assert base.last_hidden_state.shape == (*packed["input_ids"].shape, 32)
    torch.testing.assert_close(trained.lm_head(base.last_hidden_state), found.logits)


@torch.no_grad()
def test_labels_in_eval_mode_give_logits_of_the_full_length(
    trained: Any, inputs: dict[str, Tensor]
) -> None:
    trained.eval()
    try:
        wanted, found = trained(**inputs), trained(**pack(inputs))
    finally:
        trained.train()
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    assert found.logits.shape[:2] == pack(inputs)["input_ids"].shape


def test_embeddings_are_packed_as_ids_are(trained: Any, inputs: dict[str, Tensor]) -> None:
    packed = pack(inputs)
    loss, wanted = step(trained, packed)
    ids = packed.pop("input_ids")
    embeds = trained.get_input_embeddings()(ids).detach().requires_grad_()
    found = trained(**packed, inputs_embeds=embeds)
    torch.testing.assert_close(found.loss, loss.loss, rtol=1e-6, atol=1e-6)
    found.loss.backward()
    assert embeds.grad is not None
    words = torch.zeros_like(trained.get_input_embeddings().weight)
    words.index_add_(0, ids[0], embeds.grad[0])
    torch.testing.assert_close(words, wanted["model.language_model.embed_tokens.weight"])


def test_a_hook_on_the_embedding_sees_the_packed_row(
    trained: Any, inputs: dict[str, Tensor]
) -> None:
    """NEFTune's noise is scaled by the length that it sees."""
    seen: list[tuple[int, ...]] = []
    packed = pack(inputs)
    loss = trained(**packed).loss
    handle = trained.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    try:
        torch.testing.assert_close(trained(**packed).loss, loss, rtol=1e-6, atol=1e-6)
    finally:
        handle.remove()
    assert seen == [tuple(packed["input_ids"].shape)]


@pytest.mark.parametrize(
    "schedule",
    [
        "inject=1,prune=1:0.5+2:0.25,selection=dtopk",
        "inject=1,prune=1:5,score=all_text,merge=nearest_key,positions=compact",
    ],
)
def test_learned_ratios_and_merged_tokens_come_out_alike(schedule: str) -> None:
    model = hidrop.compile(tiny_llava(num_layers=3), schedule, backend="eager").train()
    padded = supervised(model, ROWS, first_column=False) | {"num_items_in_batch": torch.tensor(7)}

    def everything(given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        model.zero_grad(set_to_none=True)
        loss = model(**given).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters()}

    (loss, wanted), (found, gradients) = everything(padded), everything(pack(padded))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients, wanted)


def test_graphs_of_training_take_packed_batches(inputs: dict[str, Tensor]) -> None:
    model = hidrop.compile(
        tiny_llava(num_layers=LAYERS), PRUNED, backend="eager", cuda_graphs=True, bucket_multiple=16
    ).train()
    loss, wanted = step(model, inputs)
    found, gradients = step(model, pack(inputs))
    torch.testing.assert_close(found.loss, loss.loss, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients, wanted)


# What is refused, or is no packed batch.


def test_a_mask_makes_one_sample_of_a_row_as_in_transformers() -> None:
    model = tiny_llava(num_layers=2).train()
    packed = pack(supervised(model, ROWS[:3], first_column=False))
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    output, wanted = step(model, packed)
    with compiled_eagerly(model, "identity"):
        found, gradients = step(model, packed)
    torch.testing.assert_close(found.loss, output.loss, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients, wanted)


REFUSED: dict[str, tuple[Any, str]] = {
    "a cache": (lambda n: {"use_cache": True}, r"packed sequences \(4 samples in 1 rows\) came with a cache"),
    "a mask": (lambda n: {"attention_mask": torch.ones(1, n)}, "cu_seq_lens_q came with an attention_mask"),
    "an end": (lambda n: {"cu_seq_lens_q": torch.tensor([0, 4])}, r"cu_seq_lens_q=\[0, 4\] and cu_seq"),
    "both ends": (lambda n: dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 4])), "must ascend"),
    "others": (lambda n: dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, n])), "start anew at column"),
    "labels": (lambda n: {"labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels have shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_contradictions_are_refused(trained: Any, what: str) -> None:
    padded = batch(trained, ROWS, padding="right")
    packed = pack(padded) | bounds(padded)
    change, message = REFUSED[what]
    with pytest.raises(hidrop.InputError, match=message):
        trained(**packed | change(packed["input_ids"].shape[1]))


def test_tokens_behind_a_prompt_are_not_packed(trained: Any) -> None:
    trained.eval()
    try:
        cache = trained(**batch(trained, ROWS[:1]), use_cache=True).past_key_values
        with pytest.raises(hidrop.InputError, match="rows of a cache hold one sample each"):
            trained(
                input_ids=torch.tensor([[5, 6]]),
                past_key_values=cache,
                cu_seq_lens_q=torch.tensor([0, 1, 2]),
            )
    finally:
        trained.train()
