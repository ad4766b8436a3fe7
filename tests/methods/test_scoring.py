"""`scoring`: whether what stands behind an image has a say in which of its tokens stay."""

from __future__ import annotations

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.methods.queries import Prompt
from hidrop_fx.methods.scoring import image_ends
from tests.generate.test_later_images import kept_by
from tests.support.models import IMAGE, Make, Row, batch

PRUNES = "inject=1,prune=1:6+2:3"


@pytest.mark.parametrize("score", ["last_token", "previous_layer"])
@torch.no_grad()
def test_another_question_keeps_the_same_tokens(compiled: Make, score: str) -> None:
    prunes = PRUNES if score != "previous_layer" else "prune=1:6+2:3"
    found = {}
    for scoring in ("agnostic", "prompt"):
        model = compiled("llama", f"{prunes},score={score},scoring={scoring}")
        noted = kept_by(model, 2)
        for question in ([7, 8], [9, 10, 11], [60, 61, 62, 63]):
            rows: list[Row] = [[5, 6, IMAGE, *question], [IMAGE, 12, IMAGE, *question]]
            model(**batch(model, rows))
        found[scoring] = [sorted(kept.items()) for kept in noted]
    assert found["agnostic"][0] == found["agnostic"][1] == found["agnostic"][2]
    assert any(kept != found["prompt"][0] for kept in found["prompt"][1:])


def test_images_are_scored_by_the_last_of_their_own_tokens() -> None:
    """Two images, with text between them and without; padding; a row without any."""
    vision = torch.tensor(
        [[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    ).bool()
    valid = torch.tensor([[1] * 8, [0, *[1] * 7], [*[1] * 5, 0, 0, 0]]).bool()
    prompt = Prompt(valid=valid, text=valid & ~vision, last=torch.tensor([7, 7, 4]))
    assert image_ends(prompt).tolist() == [[2, 5], [5, -1], [4, -1]]


@torch.no_grad()
def test_the_plain_loop_scores_alike(compiled: Make) -> None:
    model = compiled("llama", f"{PRUNES},scoring=agnostic")
    rows: list[Row] = [[5, 6, IMAGE, 7, 8], [IMAGE, 9, IMAGE, 10], [11, 12]]
    assert hidrop.compare(model, **batch(model, rows), new_tokens=2).ok


def test_what_scoring_may_be() -> None:
    schedule = hidrop.Schedule.parse("prune=2:0.5,scoring=agnostic")
    assert schedule == hidrop.Schedule(prune={2: 0.5}, scoring="agnostic")
    assert hidrop.Schedule.from_json(schedule.to_json()) == schedule
    assert str(schedule) == "prune=2:0.5,scoring=agnostic"
    with pytest.raises(hidrop.ScheduleError, match="unknown scoring='blind': choose one of prompt"):
        hidrop.Schedule(scoring="blind")
    with pytest.raises(hidrop.ScheduleError, match="score='raters' chooses the rows that score"):
        hidrop.Schedule(prune={2: 0.5}, score="raters", scoring="agnostic")
