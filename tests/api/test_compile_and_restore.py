"""What compile and restore do to the model object."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.generation import new_tokens
from tests.support.models import (
    PRUNED,
    Make,
    batch,
    tiny_llava,
)
from tests.support.prompts import CLOSE, ROW, ROWS
from tests.support.reference import reference_generate, reference_logits


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
