"""Copies and pickles of a compiled model run their own weights, under their own schedule and ratios."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.models import Make, batch, tiny_llava
from tests.support.prompts import CLOSE, ROWS
from tests.support.ratios import DTOPK, HARD, supervised_batch
from tests.support.reference import reference_generate, reference_logits
from tests.support.runtimes import last_layout, runtime_in

LAYERS = 3
PARSED = hidrop.Schedule.parse(HARD)


def model_under(schedule: str = HARD, **options: Any) -> Any:
    return hidrop.compile(tiny_llava(num_layers=LAYERS), schedule, **{"backend": "eager"} | options)


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_its_base(model: Any) -> Any:
    """A pickle that comes upon the model by way of its base."""
    base, twin = pickle.loads(pickle.dumps((model.model, model)))
    assert twin.model is base
    return twin


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle protocol 1": lambda model: pickle.loads(pickle.dumps(model, protocol=1)),
    "torch.save": saved_and_loaded,
    "pickle of the base": of_its_base,
    "copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
METHODS = ("forward", "save_pretrained", "_prepare_cache_for_generation")


def test_methods_are_bound_and_look_like_those_of_hf(plain: Make) -> None:
    hf, model = plain(num_layers=LAYERS), model_under()
    for ours, theirs, names in ((model, hf, METHODS), (model.model, hf.model, ("forward",))):
        for name in names:
            method = getattr(ours, name)
            assert type(method) is MethodType
            assert method.__self__ is ours
            assert method.__name__ == name
            assert method.__qualname__ == getattr(theirs, name).__qualname__
            assert method.__doc__ == getattr(theirs, name).__doc__
            assert inspect.signature(method) == inspect.signature(getattr(theirs, name))
            function = inspect.signature(method.__func__)
            assert function == inspect.signature(getattr(type(theirs), name))


@each_copy
@torch.no_grad()
def test_a_copy_runs_its_own_weights_under_its_own_schedule(copied: Callable[[Any], Any]) -> None:
    model = model_under()
    runtime = runtime_in(model)
    twin = copied(model)  # before a call: transformers' hooks, which that sets, cannot be pickled
    inputs = batch(model, ROWS)
    before = model(**inputs).logits
    for owner, name in ((twin, "forward"), (twin.model, "forward"), (twin, "save_pretrained")):
        assert getattr(owner, name).__self__ is owner
    assert runtime_in(twin).model is twin
    assert torch.equal(twin(**inputs).logits, before)

    twin.model.language_model.layers[1].mlp.down_proj.weight.mul_(3)
    twin.lm_head.weight.mul_(2)
    expected = reference_logits(twin, PARSED, inputs)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(twin(**inputs).logits, expected, **CLOSE)
    hidden = twin.model(**inputs).last_hidden_state
    torch.testing.assert_close(twin.lm_head(hidden), expected, **CLOSE)
    found = twin.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    length = inputs["input_ids"].shape[1]
    assert found[:, length:].tolist() == reference_generate(twin, PARSED, inputs, 3)

    hidrop.compile(twin, "exit=2", backend="eager")
    assert torch.equal(model(**inputs).logits, before)
    assert runtime_in(model) is runtime
    hidrop.restore(twin)
    assert hidrop.is_compiled(model)
    assert torch.equal(model(**inputs).logits, before)
    assert not any(name.startswith("_hidrop") or name in METHODS for name in vars(twin))


def test_a_restored_model_pickles_as_a_plain_one() -> None:
    model = hidrop.restore(model_under())
    for copied in (copy.copy, copy.deepcopy, COPIES["pickle"]):
        assert copied(model).forward.__func__ is type(model).forward


@each_copy
def test_a_copy_learns_its_own_ratios(copied: Callable[[Any], Any]) -> None:
    model = model_under(DTOPK).train()
    with torch.no_grad():
        model.hidrop_ratios.values += 1 / 9
    twin = copied(model)
    inputs = supervised_batch(model)
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss)
    with torch.no_grad():
        twin.hidrop_ratios.values -= 1 / 9
    twin(**inputs).loss.backward()
    model(**inputs)
    assert last_layout(model).vision_counts["prune_1"] == [5, 5, 0]
    assert last_layout(twin).vision_counts["prune_1"] == [6, 6, 0]
    assert twin.hidrop_ratios.values.grad is not None
    assert model.hidrop_ratios.values.grad is None


@pytest.mark.parametrize("schedule", [HARD, DTOPK])
@torch.no_grad()
def test_a_shallow_copy_shares_its_modules_and_has_a_mode_and_a_schedule(schedule: str) -> None:
    model = model_under(schedule)
    inputs = batch(model, ROWS)
    before = model(**inputs).logits
    twin = copy.copy(model)
    assert twin.forward.__self__ is twin
    assert twin.model is model.model
    assert torch.equal(twin(**inputs).logits, before)
    twin.train()
    assert (twin.training, model.training) == (True, False)
    twin.eval()
    with pytest.raises(hidrop.HidropError, match=r"is that of another compiled model.*inject=1"):
        hidrop.compile(twin, "exit=2", backend="eager")
    assert torch.equal(twin(**inputs).logits, before)
    hidrop.restore(twin)
    assert torch.equal(model(**inputs).logits, before)
    again = copy.copy(model)
    hidrop.restore(model)
    if schedule == DTOPK:
        with pytest.raises(hidrop.HidropError, match=r"hidrop_ratios.*is gone.*shallow copy"):
            again(**inputs)
        hidrop.compile(again, schedule, backend="eager")
        assert torch.equal(again(**inputs).logits, before)
    else:
        assert torch.equal(again(**inputs).logits, before)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
@torch.no_grad()
def test_a_copy_of_the_base_alone_keeps_the_schedule(name: str) -> None:
    model = model_under()
    base = COPIES[name](model.model)
    inputs = batch(model, ROWS)
    expected = model.model(**inputs).last_hidden_state
    base.language_model.norm.weight.mul_(2)
    torch.testing.assert_close(base(**inputs).last_hidden_state, 2 * expected, **CLOSE)


@pytest.mark.parametrize("name", [n for n, f in COPIES.items() if f is not of_its_base])
@torch.no_grad()
def test_a_copy_of_an_adapted_model_saves_its_own_schedule(name: str, tmp_path: Any) -> None:
    """A wrapper has no base of the kind that a copy may be made of alone."""
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)")
    model = peft.get_peft_model(tiny_llava(num_layers=LAYERS), config).eval()
    hidrop.compile(model, HARD, backend="eager")
    twin = COPIES[name](model)
    hidrop.compile(twin, "exit=2", backend="eager")
    inputs = batch(twin.get_base_model(), ROWS)
    plain = hidrop.compile(tiny_llava(num_layers=LAYERS), "exit=2", backend="eager")
    torch.testing.assert_close(twin(**inputs).logits, plain(**inputs).logits, **CLOSE)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    assert '"exit": 2' in (tmp_path / "twin" / "hidrop.json").read_text()
    assert '"inject": 1' in (tmp_path / "model" / "hidrop.json").read_text()
    hidrop.restore(twin)
    assert not any(name.startswith("_hidrop") or name in METHODS for name in vars(twin))


@torch.no_grad()
def test_a_copy_of_a_wrapped_model_runs_compiled() -> None:
    """accelerate's wrapper is deep-copied; a pickle leaves it out, as of a plain model."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    model = model_under()
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    loaded = pickle.loads(pickle.dumps(model))
    inputs = batch(model, ROWS)
    found = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, found)
    twin.lm_head.weight.mul_(2)
    torch.testing.assert_close(twin(**inputs).logits, 2 * found)
    exact = reference_logits(loaded, PARSED, inputs)
    torch.testing.assert_close(loaded(**inputs).logits, exact, **CLOSE)


def test_a_copied_tower_drags_no_model_along() -> None:
    """Its layers are compiled for one model alone, and a copy of that model compiles its own."""
    model = model_under(overlap_vision=True, backend="inductor", lowering="bodies")
    layer = model.model.vision_tower.encoder.layers[0]
    assert "forward" in vars(layer)
    for copied in (copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        twin = copied(layer)
        assert not {"forward", "__reduce_ex__", "_hidrop_overrides"} & vars(twin).keys()
    whole = copy.deepcopy(model)
    own = whole.model.vision_tower.encoder.layers[0]
    assert "forward" not in vars(own)
    for listener in runtime_in(whole).on_program:
        listener(runtime_in(whole))
    assert own.forward.__self__ is own
    hidrop.restore(whole)
    assert "forward" not in vars(own)
    assert "forward" in vars(layer)


def test_a_model_of_its_own_class_takes_the_state_dict() -> None:
    model = model_under(DTOPK)
    other: Any = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    inputs = batch(other, ROWS)
    hf = tiny_llava(num_layers=LAYERS)
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, hf(**inputs).logits)


def test_a_model_that_was_called_pickles_as_hf_s_does() -> None:
    """transformers' hooks, which the first call with images sets, are functions of a function."""
    said = []
    for model in (tiny_llava(num_layers=LAYERS), model_under()):
        with torch.no_grad():
            model(**batch(model, ROWS))
        with pytest.raises((AttributeError, pickle.PicklingError)) as caught:
            pickle.dumps(model)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "output_capturing_hook" in said[0]


def test_replicas_of_data_parallel_are_refused() -> None:
    model = model_under()
    with pytest.raises(hidrop.UnsupportedModelError, match=r"nn.DataParallel.*torchrun"):
        model._replicate_for_data_parallel()


def answers_of_child(model: Any, inputs: dict[str, Any]) -> Any:
    tiny_llava(num_layers=1)  # transformers notes in `__init__` which outputs a class records
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_another_process_gives_the_same_answers(method: str) -> None:
    model = model_under()
    inputs = batch(model, ROWS)
    with torch.multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply(answers_of_child, (model, inputs))
    torch.testing.assert_close(found, answers_of_child(model, inputs), **CLOSE)
