"""lmms-eval with the model `hidrop`: its answers are those of `generate`, asked one by one; what a sample cost is counted."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import picture
from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.models.prompts import chat_inputs, greedy_answer
from tests.support.lmms_tasks import NEW_TOKENS, SECOND, write_tasks
from tests.support.paths import ROOT
from tests.support.reference import reference_logits

INSTALL = "pip install -e '.[test-eval]' && pip install --no-deps lmms-eval==0.7.3"
pytest.importorskip("lmms_eval", reason=f"lmms-eval is not installed: {INSTALL}")
for needed in ("datasets", "evaluate", "loguru", "pytz", "sacrebleu", "tenacity"):
    pytest.importorskip(needed, reason=f"lmms-eval cannot import {needed}: {INSTALL}")

from lmms_eval.api.instance import Instance, unwrap_generation_output  # noqa: E402

pytestmark = pytest.mark.xdist_group("lmms_eval")  # its runs are made once
torch.set_num_threads(1)
SCHEDULE = "inject=3,prune=5:48,exit=9"
VISION = {"vanilla": 144.0, SCHEDULE: (2 * 144 + 4 * 48) / 12}
"""Of one image: layers 3 and 4 run on all, 5 to 8 on 48, of twelve."""
RUNS = [
    {"model_args": "schedule=vanilla,batch_size=3", "force_simple": False},
    {
        "model_args": f"schedule={SCHEDULE.replace(',', ';')},backend=eager,batch_size=3",
        "force_simple": False,
    },
    {"model_args": f'backend=eager,schedule="{SCHEDULE}",batch_size=2', "force_simple": True},
]


@functools.cache
def asked_alone(schedule: str) -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).eval()
    if schedule != "vanilla":
        model = hidrop.compile(model, schedule, backend="eager")
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


def alone(schedule: str, images: Sequence[str], question: str) -> tuple[str, int]:
    """The answer to one question, and the tokens of its prompt."""
    model, processor = asked_alone(schedule)
    inputs = chat_inputs(model, processor, [Image.open(path) for path in images], question)
    answer = greedy_answer(model, processor, inputs, NEW_TOKENS)
    return answer, inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[dict[str, Any]]:
    return write_tasks(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def runs(folder: Path, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What lmms-eval's `simple_evaluate` returns, in a process of its own: it changes libraries for all that run beside it."""
    pytest.importorskip("filelock._api", reason=f"lmms-eval 0.7.3 needs filelock 3: {INSTALL}")
    (folder / "runs.json").write_text(json.dumps(RUNS))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    files = [str(folder), str(folder / "runs.json"), str(folder / "results.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.lmms_tasks", *files],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    ("run", "schedule"),
    [(0, "vanilla"), (1, SCHEDULE), (2, SCHEDULE)],
    ids=["plain", "chat", "simple"],
)
def test_answers_are_those_of_generate(
    run: int, schedule: str, runs: list[dict[str, Any]], documents: list[dict[str, Any]]
) -> None:
    found = runs[run]
    simple = "HidropSimple (simple)" if RUNS[run]["force_simple"] else "HidropChat (chat)"
    assert found["config"]["model_backend"] == f"hidrop_fx.evaluation.lmms.{simple}"
    samples = sorted(found["samples"]["drawn"], key=lambda one: one["doc_id"])
    assert len(samples) == len(documents)
    answers = []
    for sample, document in zip(samples, documents, strict=True):
        answer, tokens = alone(schedule, document["images"], document["question"])
        answers.append(answer == document["answer"])
        assert sample["resps"] == [[answer]]
        (counts,) = sample["token_counts"]
        assert counts["input_tokens"] == tokens
        assert counts["vision_tokens"] == VISION[schedule] * len(document["images"])
        assert 1 <= counts["output_tokens"] <= NEW_TOKENS
        assert counts["first_token_seconds"] > 0
        assert counts["tokens_per_second"] > 0
    assert found["results"]["drawn"]["exact_match,none"] == sum(answers) / len(answers)
    assert sum(answers) >= 3  # the model answers, and does not repeat itself


@pytest.mark.parametrize(
    ("run", "schedule"),
    [(0, "vanilla"), (1, SCHEDULE), (2, SCHEDULE)],
    ids=["plain", "chat", "simple"],
)
def test_rounds_are_answered_one_after_the_other(
    run: int, schedule: str, runs: list[dict[str, Any]], documents: list[dict[str, Any]]
) -> None:
    samples = sorted(runs[run]["samples"]["drawn_rounds"], key=lambda one: one["doc_id"])
    for sample, document in zip(samples, documents, strict=True):
        asked = [alone(schedule, document["images"], q) for q in (document["question"], SECOND)]
        assert sample["resps"] == [[[answer for answer, _ in asked]]]
        (counts,) = sample["token_counts"]
        assert counts["input_tokens"] == sum(tokens for _, tokens in asked)
        assert counts["vision_tokens"] == VISION[schedule] * len(document["images"])


def test_the_throughput_of_a_run_is_among_its_results(runs: list[dict[str, Any]]) -> None:
    for run, schedule in zip(runs, ("vanilla", SCHEDULE, SCHEDULE), strict=True):
        found = run["throughput"]
        counts = [sample["token_counts"][0] for task in run["samples"].values() for sample in task]
        assert found["total_gen_tokens"] == sum(one["output_tokens"] for one in counts)
        assert 0 < found["avg_ttft"] < found["total_elapsed_time"]
        assert found["avg_speed"] == pytest.approx(
            found["total_gen_tokens"] / found["total_elapsed_time"]
        )
        assert found["avg_vision_tokens"] == pytest.approx(
            VISION[schedule]
        )  # an image each, on average


def test_the_entry_point_names_both_classes() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    written = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name, value = written["project"]["entry-points"]["lmms_eval.models"].popitem()
    payload = importlib.metadata.EntryPoint(name, value, "lmms_eval.models").load()
    registry = ModelRegistryV2()
    registry.register_manifest(payload())
    assert registry.get_model_class("hidrop").__name__ == "HidropChat"
    assert registry.get_model_class("hidrop", force_simple=True).__name__ == "HidropSimple"


@functools.cache
def classes() -> SimpleNamespace:
    from hidrop_fx.evaluation import lmms

    return SimpleNamespace(chat=lmms.HidropChat, simple=lmms.HidropSimple)


def make(kind: str, arguments: str = "schedule=vanilla") -> Any:
    return getattr(classes(), kind).create_from_arg_string(
        arguments, {"batch_size": 1, "device": "cpu"}
    )


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    metadata = {"task": "drawn", "doc_id": 0, "repeats": 1}
    return [
        Instance(request_type=kind, arguments=each, idx=i, metadata=metadata)  # type: ignore[arg-type, unused-ignore]
        for i, each in enumerate(arguments)
    ]


def shown(document: Any) -> list[Any]:
    return [picture(document, "test").image]


@pytest.mark.parametrize("schedule", ["vanilla", SCHEDULE])
def test_likelihoods_are_the_loss_of_transformers_and_of_the_reference(schedule: str) -> None:
    found = make("simple", f'schedule="{schedule}",backend=eager,batch_size=2')
    found.task_dict["drawn"] = {"test": [0, 1, 2]}
    question, answers = "Which word is at the top?", ("map", "red ring", "0")
    asked = [(question, one, shown, i, "drawn", "test") for i, one in enumerate(answers)]
    asked[1] = (question, lambda document: answers[document], *asked[1][2:])
    losses = found.loglikelihood(requests("loglikelihood", *asked))
    model, processor = asked_alone("vanilla")
    for i, (answer, (loss, greedy)) in enumerate(zip(answers, losses, strict=True)):
        image = picture(i, "test").image
        prompt = f"USER: <image>\n{question} ASSISTANT:"
        length = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(images=image, text=f"{prompt} {answer} ", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :length] = -100
        with torch.no_grad():
            if schedule == "vanilla":
                done = model(**inputs, labels=labels)
                expected, logits = done.loss, done.logits
            else:
                given = {**inputs, "labels": labels}
                logits = reference_logits(model, hidrop.Schedule.parse(schedule), given)
                expected = torch.nn.functional.cross_entropy(
                    logits[0, length - 1 : -1], labels[0, length:]
                )
        assert loss == pytest.approx(float(expected), rel=1e-4)
        picked = logits[0, length - 1 : -1].argmax(dim=-1)
        assert greedy == bool((picked == labels[0, length:]).all())


def test_errors_are_raised_and_no_sample_is_scored_by_an_empty_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = make("simple")
    found.task_dict["drawn"] = {"test": [0]}

    def ask(visuals: Any, text: str = "Which word is there?", **generation: Any) -> Any:
        arguments = (
            text,
            {"max_new_tokens": 2, **generation},
            lambda _: visuals,
            0,
            "drawn",
            "test",
        )
        return found.generate_until(requests("generate_until", arguments))

    with pytest.raises(InputError, match=r"a task shows a bytes"):
        ask([b"\0"])
    with pytest.raises(InputError, match=r"no image file none\.png"):
        ask(["none.png"])
    with pytest.raises(InputError, match=r"has 2 places <image> for 1 visuals"):
        ask(shown(0), "<image> or <image>?")
    with pytest.raises(InputError, match=r"until=3"):
        ask(shown(0), until=3)
    (placed,) = ask(shown(0), "<image>\nWhich word is there?")
    (first,) = ask(shown(0))
    assert placed.text == first.text != ""

    def fails(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(found.model, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(shown(0))


def test_messages_of_other_kinds_are_refused() -> None:
    found = make("chat")
    found.task_dict["drawn"] = {"test": [0]}
    for part, message in (
        ({"type": "audio", "url": "a.wav"}, "a part of type 'audio'"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "a span of a video"),
    ):
        said = [{"role": "user", "content": [part]}]
        arguments = ("", lambda _, said=said: said, {}, 0, "drawn", "test")
        with pytest.raises(InputError, match=message):
            found.generate_until(requests("generate_until", arguments))
    arguments = ("", lambda _: [{"role": "tool", "content": "x"}], {}, 0, "drawn", "test")
    with pytest.raises(InputError, match="has the role 'tool'"):
        found.generate_until(requests("generate_until", arguments))


def test_a_system_prompt_goes_in_front_and_until_ends_an_answer() -> None:
    found = make("chat", "schedule=vanilla,system_prompt=Which word is there?")
    found.task_dict["drawn"] = {"test": [0]}
    said = [{"role": "user", "content": [{"type": "image", "url": picture(0, "test").image}]}]
    arguments = ("", lambda _: said, {"max_new_tokens": 3}, 0, "drawn", "test")
    (whole,) = found.generate_until(requests("generate_until", arguments))
    model, processor = asked_alone("vanilla")
    text = "SYSTEM: Which word is there? USER: <image>\n ASSISTANT:"
    inputs = processor(images=picture(0, "test").image, text=text, return_tensors="pt")
    assert whole.text == greedy_answer(model, processor, inputs, 3)
    ended = (*arguments[:2], {"max_new_tokens": 3, "until": whole.text[1:3]}, *arguments[3:])
    (cut,) = found.generate_until(requests("generate_until", ended))
    assert cut.text == whole.text[0]
    assert (
        unwrap_generation_output(cut)[1].to_dict()["input_tokens"] == inputs["input_ids"].shape[1]
    )


def test_a_wrong_batch_size_is_refused() -> None:
    with pytest.raises(HidropError, match="batch_size=auto: write a whole number from 1 on"):
        make("chat", "batch_size=auto")


@pytest.mark.slow
def test_the_command_line_finds_the_model(folder: Path, documents: list[dict[str, Any]]) -> None:
    """Needs the entry point of an installed package: `pip install -e .` writes it anew."""
    pytest.importorskip("filelock._api", reason=f"lmms-eval 0.7.3 needs filelock 3: {INSTALL}")
    pytest.importorskip("pytablewriter", reason=f"its command prints tables by it: {INSTALL}")
    out = folder / "out"
    command = [sys.executable, "-m", "hidrop_fx", "eval", "--tasks", "drawn", "--include-path"]
    command += [str(folder), "--schedule", SCHEDULE, "--backend", "eager", "--output", str(out)]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    assert "exact_match,none" in json.loads(results.read_text())["results"]["drawn"]
    (lines,) = out.rglob("*_samples_drawn.jsonl")
    counts = [json.loads(line)["token_counts"][0] for line in lines.read_text().splitlines()]
    assert sorted(one["vision_tokens"] for one in counts) == [0.0, 40.0, 40.0, 40.0, 80.0]
