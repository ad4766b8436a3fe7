"""TRL's trainers that replace a model's forward: DPO, with and without LoRA, and GRPO, run for real.

Held against the eager reference, and under `Schedule()` against the plain model.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.program.outputs import columns_output
from tests.support.models import IMAGE, PAD, VOCAB, batch, tiny_llava
from tests.support.reference import reference_logits
from tests.support.runtimes import runtime_in
from tests.support.trainers import options

PRUNED = "inject=1,prune=1:6+2:3"
LAYERS = 3
PROMPTS: list[list[int | str]] = [
    [5, IMAGE, 6, 7],
    [8, 9, IMAGE, 10],
    [11, IMAGE, 12],
    [13, 14, 15],
]
CHOSEN = [[16, 17, 2], [18, 2], [19, 20, 21, 2], [22, 2]]
REJECTED = [[23, 2], [24, 25, 2], [26, 2], [27, 28, 29, 2]]


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")
    return pytest.importorskip("trl", reason="trl, an optional dependency, is not installed")


def lora() -> Any:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    return peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)")


def tokenizer() -> Any:
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=f"w{PAD}", eos_token="w2", unk_token="w3"
    )


# DPO.


def pairs(numbers: list[int]) -> dict[str, Tensor]:
    """Return the batch that TRL's collator would make: chosen rows, then rejected ones, pads on the right."""
    answers = [CHOSEN[n] for n in numbers] + [REJECTED[n] for n in numbers]
    rows: list[list[int | str]] = [
        [*PROMPTS[n], *answer] for n, answer in zip(numbers * 2, answers, strict=True)
    ]
    inputs = batch(tiny_llava(num_layers=1), rows, padding="right", seed=sum(numbers))
    mask, completion = inputs["attention_mask"], torch.zeros_like(inputs["attention_mask"])
    for row, answer in enumerate(answers):
        end = int(mask[row].sum())
        completion[row, end - len(answer) : end] = 1
    return inputs | {"completion_mask": completion}


def dpo(trl: Any, model: Any, directory: Path, **given: Any) -> Any:
    import datasets

    rows = [{"prompt": "w5", "chosen": "w6", "rejected": "w7", "number": n} for n in range(4)]
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            **options(directory, max_steps=2),
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=lambda rows: pairs([row["number"] for row in rows]),
        processing_class=tokenizer(),
        **given,
    )


def history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def log_probs(model: Any, schedule: str, inputs: dict[str, Tensor]) -> Tensor:
    """Sum of each row's answer, [2 * pairs], by the eager reference."""
    given = {k: v for k, v in inputs.items() if k != "completion_mask"}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    parsed = hidrop.Schedule.parse(schedule, num_layers=LAYERS)
    with torch.no_grad():
        logits = reference_logits(model, parsed, {**given, "labels": labels})
    chosen = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[:, :, 0]
    return (chosen * (labels[:, 1:] != -100)).sum(1)


@pytest.mark.parametrize(
    ("adapted", "schedule"),
    [
        (False, PRUNED),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in product([True], [PRUNED, "identity"])
        ),
        pytest.param(False, "identity", marks=pytest.mark.slow),
    ],
)
def test_two_equal_models_have_no_margin(
    trl: Any, tmp_path: Path, adapted: bool, schedule: str
) -> None:
    """The reference is a copy on which neither `train` nor `eval` is called again."""
    model = hidrop.compile(tiny_llava(num_layers=LAYERS), schedule, backend="eager")
    given = {"peft_config": lora()} if adapted else {"ref_model": copy.deepcopy(model)}
    trainer = dpo(trl, model, tmp_path, **given)
    inputs = pairs([0, 1, 2, 3])
    expected = log_probs(tiny_llava(num_layers=LAYERS), schedule, inputs)
    names = ("logps/chosen", "logps/rejected")
    for training in (None, True, False):
        if training is not None:
            trainer.model.train(training)
        trainer._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        with torch.no_grad():
            trainer.compute_loss(trainer.model, dict(inputs))
        mode = "train" if trainer.model.training else "eval"
        found = {name: values[-1] for name, values in trainer._metrics[mode].items()}
        assert found["rewards/margins"] == pytest.approx(0, abs=1e-6)
        halves = [half.mean().item() for half in expected.chunk(2)]
        assert [found[name] for name in names] == pytest.approx(halves, rel=1e-4)
    trainer.train()
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert abs(history(trainer, "rewards/margins")[1]) > 1e-4, "a step was made"


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_dpo_gives_what_it_gives_for_the_plain_model(
    trl: Any, tmp_path: Path, adapted: bool
) -> None:
    results = []
    for compiled in (True, False):
        model: Any = tiny_llava(num_layers=LAYERS)
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        given = {"peft_config": lora()} if adapted else {"ref_model": copy.deepcopy(model)}
        trainer = dpo(trl, model, tmp_path, **given)
        trainer.train()
        results.append((history(trainer, "loss"), history(trainer, "rewards/margins")))
    (losses, margins), (expected_losses, expected_margins) = results
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert margins == pytest.approx(expected_margins, rel=1e-3, abs=1e-6)


# GRPO.


def grpo(trl: Any, model: Any, processor: Any, directory: Path) -> Any:
    import datasets
    from PIL import Image

    colours = ("red", "blue", "green", "white")
    rows = [
        {
            "prompt": [{"role": "user", "content": "what is there"}],
            "image": Image.new("RGB", (96, 96), c),
        }
        for c in colours
    ]
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, completion_ids, **_: [
            float(sum(c)) for c in completion_ids
        ],
        args=trl.GRPOConfig(
            **options(directory, max_steps=2) | {"per_device_train_batch_size": 4},
            num_generations=2,
            max_completion_length=4,
            bf16=False,
            beta=0.1,
            gradient_checkpointing=False,
            seed=3,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )


@pytest.mark.slow
def test_grpo_scores_as_the_reference_and_as_the_plain_model(trl: Any, tmp_path: Path) -> None:
    from hidrop_fx.demo import MODEL_DIR
    from hidrop_fx.models.loading import load_model

    results = []
    for schedule in ("identity", None):
        model, processor = load_model(MODEL_DIR)
        model = model.float()
        if schedule is not None:
            hidrop.compile(model, schedule, backend="eager")
        trainer = grpo(trl, model, processor, tmp_path)
        trainer.train()
        results.append([history(trainer, name) for name in ("loss", "reward", "entropy", "kl")])
    for found, expected in zip(*results, strict=True):
        assert len(found) == 2
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_grpo_trains_under_a_schedule(trl: Any, tmp_path: Path) -> None:
    """Log-probabilities of the answers, which the fused head keeps to itself, are the reference's."""
    from hidrop_fx.demo import MODEL_DIR
    from hidrop_fx.models.loading import load_model

    model, processor = load_model(MODEL_DIR)
    model = hidrop.compile(model.float(), "inject=2,prune=4:20+6:8", backend="eager")
    plain = load_model(MODEL_DIR)[0].float()
    trainer = grpo(trl, model, processor, tmp_path)
    compute, seen = trainer._get_per_token_logps_and_entropies, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        if args[0] is model:  # and not the reference, which the trainer loads itself, uncompiled
            seen.append((args, kwargs, found[0].detach()))
        return found

    trainer._get_per_token_logps_and_entropies = noted
    trainer.train()
    args, kwargs, found = seen[0]
    ids, mask, keep = args[1:4]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-keep] = -100
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": kwargs["pixel_values"][: len(ids)],
        "labels": labels,
    }
    schedule = hidrop.Schedule.parse("inject=2,prune=4:20+6:8")
    with torch.no_grad():
        logits = reference_logits(plain, schedule, inputs)
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, -keep:, 0]
    shown = labels[:, -keep:] != -100
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-3, atol=1e-3)
    assert len(history(trainer, "loss")) == 2


@pytest.mark.parametrize("score", ["last_token", "all_text"])
def test_training_gives_generated_tokens_their_log_probabilities(
    trl: Any, tmp_path: Path, score: str
) -> None:
    """Scores are those of the prompt, whatever was answered: all answers to a prompt keep the same tokens."""
    from hidrop_fx.demo import MODEL_DIR
    from hidrop_fx.demo.pictures import picture
    from hidrop_fx.models.loading import load_model
    from hidrop_fx.models.prompts import chat_inputs

    model, processor = load_model(MODEL_DIR)
    schedule = f"inject=2,prune=4:20+6:8,score={score}"
    model = hidrop.compile(model.float(), schedule, backend="eager")
    trainer = grpo(trl, model, processor, tmp_path)
    model.eval()
    kept: list[dict[str, Tensor]] = []
    runtime_in(model).on_outputs.append(
        lambda prepared, outputs: kept.append(kept_vision(prepared, outputs))
    )
    question = "Which word is at the top left?"
    inputs = chat_inputs(model, processor, [picture(0, "test").image], question)
    answers, new = 3, 6
    torch.manual_seed(1)
    generated = model.generate(
        **inputs,
        do_sample=True,
        temperature=3.0,
        num_return_sequences=answers,
        max_new_tokens=new,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = generated.sequences
    tokens = ids[:, -new:]
    assert len(set(map(tuple, tokens.tolist()))) == answers, "the answers differ"
    expected = torch.stack(generated.logits, dim=1).log_softmax(-1).gather(2, tokens[:, :, None])
    prompt = kept[0]
    kept.clear()
    model.train()
    found = trainer._get_per_token_logps_and_entropies(
        model,
        ids,
        torch.ones_like(ids),
        new,
        pixel_values=inputs["pixel_values"].repeat(answers, 1, 1, 1),
        num_images=[1] * answers,
    )[0]
    torch.testing.assert_close(found, expected[:, :, 0], rtol=0, atol=1e-4)
    assert prompt.keys() == kept[0].keys() == {"prune_4", "prune_6"}
    for name, columns in kept[0].items():
        assert len(columns) == answers
        for row in columns:
            assert torch.equal(row, prompt[name][0])


def kept_vision(prepared: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns [B, kept] of the vision tokens behind each prune of a call."""
    if prepared.kind == "decode":
        return {}
    layout, found = prepared.context.layout, {}
    for name in ("prune_4", "prune_6"):
        columns = outputs[columns_output(name)]
        is_vision = layout.is_vision.gather(1, columns)
        found[name] = torch.stack([c[v] for c, v in zip(columns, is_vision, strict=True)])
    return found
