"""--model_args of lmms-eval, and what tasks say about generation."""

from __future__ import annotations

import logging
import re

import pytest

from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.evaluation.generation import NEW_TOKENS, Generation
from hidrop_fx.evaluation.lmms_arguments import read_model_args
from hidrop_fx.schedule.schedule import Schedule
from tests.support.paths import ROOT


def constructor(
    pretrained: str | None = None,
    schedule: str | None = None,
    batch_size: int = 1,
    backend: str = "inductor",
) -> None:
    """Take the arguments of a model class."""


def load(pretrained: str, schedule: str, batch_size: int = 1, dtype: str = "auto") -> None:
    """Take the arguments of the page."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("pretrained=a/b,batch_size=8", {"pretrained": "a/b", "batch_size": "8"}),
        ("schedule=hidrop-64, backend=eager", {"schedule": "hidrop-64", "backend": "eager"}),
        (
            "schedule=visionzip(dominant=54,contextual=10),batch_size=2",
            {"schedule": "visionzip(dominant=54,contextual=10)", "batch_size": "2"},
        ),
        (
            "backend=eager,schedule=visionzip(dominant=54;contextual=10)",
            {"schedule": "visionzip(dominant=54,contextual=10)", "backend": "eager"},
        ),
        (
            "schedule=inject=8;prune=10:215+14:10;exit=24",
            {"schedule": "inject=8,prune=10:215+14:10,exit=24"},
        ),
        (
            'pretrained="a, b",schedule="inject=8,exit=24"',
            {"pretrained": "a, b", "schedule": "inject=8,exit=24"},
        ),
        (
            'schedule={"inject": 8, "exit": 24},batch_size=2',
            {"schedule": '{"inject": 8, "exit": 24}', "batch_size": "2"},
        ),
    ],
)
def test_commas_in_a_schedule_are_told_from_those_behind_it(
    text: str, expected: dict[str, str]
) -> None:
    assert read_model_args(text, constructor) == expected


def test_commands_of_the_page_are_read() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    found = re.findall(r'--model_args ("[^"]+"|\S+)', page)
    assert len(found) == 3
    for text in found:
        Schedule.parse(read_model_args(text.strip('"'), load)["schedule"])


def test_a_program_may_pass_a_dictionary() -> None:
    given = {"schedule": "inject=8,exit=24", "batch_size": 4}
    assert read_model_args(given, constructor) == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule=inject=8,exit=24", r"exit=24 is a field of a schedule.*write semicolons in it"),
        ("schedule=visionzip(dominant=54", r"brackets of schedule=visionzip\(dominant=54 do not"),
        ("schedule=inject=8,24", r"'24' is not name=value.*in a schedule write semicolons"),
        ("schedule=", r"'schedule=' is not name=value"),
        ("pretrained=a,modul=b", r"there is no 'modul'; the names are pretrained, schedule"),
        ("backend=eager,backend=eager", r"backend is given twice"),
    ],
)
def test_a_mistake_is_named_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(HidropError, match=message):
        read_model_args(text, constructor)


def test_generation_is_greedy_at_temperature_0_and_sampled_above() -> None:
    task = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "until": "\n\n", "max_new_tokens": 16}
    found = Generation.of_task(task)
    assert dict(found.arguments) == {"num_beams": 1, "max_new_tokens": 16, "do_sample": False}
    assert found.cut(" yes \n\n no") == "yes"
    sampled = Generation.of_task({"temperature": 0.2, "top_p": None})
    assert dict(sampled.arguments) == {
        "temperature": 0.2,
        "top_p": None,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": True,
    }
    assert Generation.of_task({"temperature": 0.2, "do_sample": False}).arguments == {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }


def test_what_generate_does_not_know_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hidrop_fx"):
        found = Generation.of_task({"image_aspect_ratio": "pad", "patience_of_a_saint": 1})
    assert set(found.arguments) == {"max_new_tokens", "do_sample"}
    assert "'patience_of_a_saint' of a task is no argument" in caplog.text
    assert "image_aspect_ratio" not in caplog.text


def test_until_must_be_texts() -> None:
    with pytest.raises(InputError, match=r"until=\[1\]: write a text that ends an answer"):
        Generation.of_task({"until": [1]})
