"""Several schedules on one compiled model: each call runs under its own, over one capture and the same layer bodies."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of, schedules_of
from hidrop_fx.training.sidecar import RATIOS_FILE, SCHEDULE_FILE
from tests.support import counter
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, PRUNED, batch, supervised, tiny_llava
from tests.support.prompts import CLOSE
from tests.support.reference import reference_generate, reference_logits
from tests.support.runtimes import runtime_in
from tests.support.trainers import trainer

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [4, 5, 6, 7], [IMAGE, 5, IMAGE, 12, 13]]
OTHER = "inject=1,prune=1:3+2:2,exit=3"
"""Another budget of the structure of PRUNED."""
DTOPK = "inject=1,prune=1:6+2:3,selection=dtopk"
NAMED = {"fast": PRUNED, "less": OTHER, "full": hidrop.Schedule()}


def compiled(schedules: Any = NAMED, **options: Any) -> Any:
    given = {"backend": "eager"} | options
    return hidrop.compile(tiny_llava(), schedules, **given)


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled()


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return batch(model, ROWS)


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Tensor]) -> dict[str, list[list[int]]]:
    plain = tiny_llava()
    found = {n: reference_generate(plain, parsed(s), inputs, 4) for n, s in NAMED.items()}
    assert len({str(tokens) for tokens in found.values()}) == 3, "the schedules tell apart"
    return found


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        yield lambda: [record.getMessage() for record in caplog.records]


def parsed(schedule: hidrop.Schedule | str) -> hidrop.Schedule:
    return schedule if isinstance(schedule, hidrop.Schedule) else hidrop.Schedule.parse(schedule)


@torch.no_grad()
def test_each_call_runs_under_its_schedule(
    model: Any, inputs: dict[str, Tensor], expected: dict[str, list[list[int]]]
) -> None:
    logits = {n: reference_logits(tiny_llava(), parsed(s), inputs) for n, s in NAMED.items()}
    assert new_tokens(model, inputs, 4) == expected["fast"], "the first is the default"
    for name in NAMED:
        assert new_tokens(model, inputs, 4, hidrop_schedule=name) == expected[name]
        with hidrop.use(model, name) as schedule:
            assert schedule == parsed(NAMED[name])
            assert new_tokens(model, inputs, 4) == expected[name]
            torch.testing.assert_close(model(**inputs).logits, logits[name], **CLOSE)
        for call in (model, model.forward):
            found = call(**inputs, hidrop_schedule=name).logits
            torch.testing.assert_close(found, logits[name], **CLOSE)
        hidden = model.model(**inputs, hidrop_schedule=name).last_hidden_state
        kept = logits[name].abs().sum(-1) > 0
        torch.testing.assert_close(model.lm_head(hidden)[kept], logits[name][kept], **CLOSE)
    assert new_tokens(model, inputs, 4, hidrop_schedule=None) == expected["fast"]
    with hidrop.use(model, "full"), hidrop.use(model, "less"):
        assert new_tokens(model, inputs, 4) == expected["less"], "the innermost"
        assert new_tokens(model, inputs, 4, hidrop_schedule="fast") == expected["fast"]
        with pytest.raises(ValueError, match="no such"), hidrop.use(model, "full"):
            raise ValueError("no such")
        assert new_tokens(model, inputs, 4) == expected["less"], "an error ends a block too"
    assert new_tokens(model, inputs, 4) == expected["fast"]


def test_schedules_share_capture_and_bodies(inputs: dict[str, Tensor]) -> None:
    model = compiled()
    with counter.expect(captures=1, programs=2):
        new_tokens(model, inputs, 2)
    store = runtime_in(model).programs.store
    bodies = len(store.bodies)
    with counter.expect(captures=0, programs=2):
        new_tokens(model, inputs, 2, hidrop_schedule="less")
    assert len(store.bodies) == bodies, "keep counts are inputs of the same layer bodies"
    with counter.expect(captures=0, programs=0), hidrop.use(model, OTHER):
        new_tokens(model, inputs, 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lowering", [None, "whole"])
def test_another_budget_compiles_nothing(
    backend: str, lowering: str | None, expected: dict[str, list[list[int]]]
) -> None:
    model = compiled(backend=backend, lowering=lowering)
    inputs = batch(model, ROWS)
    with counter.expect(captures=1, compiled=range(2, 9)):
        assert new_tokens(model, inputs, 4) == expected["fast"]
    with counter.expect(captures=0, compiled=0):
        assert new_tokens(model, inputs, 4, hidrop_schedule="less") == expected["less"]
        with hidrop.use(model, "inject=1,prune=1:5+2:4,exit=3"):
            new_tokens(model, inputs, 4)
    assert new_tokens(model, inputs, 4, hidrop_schedule="full") == expected["full"]
    labelled = supervised(model.train(), ROWS)
    for name, compiles in (("fast", range(1, 9)), ("less", 0)):
        with counter.expect(compiled=compiles), hidrop.use(model, name):
            model(**labelled).loss.backward()


@pytest.mark.slow
def test_recorded_graphs_of_all_schedules_share_memory(
    expected: dict[str, list[list[int]]],
) -> None:
    model = compiled(cuda_graphs=True)
    inputs = batch(model, ROWS)
    for _ in range(3):
        for name in NAMED:
            assert new_tokens(model, inputs, 4, hidrop_schedule=name) == expected[name]
    with counter.expect(recorded=0):
        for name in NAMED:
            assert new_tokens(model, inputs, 4, hidrop_schedule=name) == expected[name]
    runners = {id(runtime.graphs) for runtime in runtime_in(model).peers}
    assert len(runners) == 1
    model.get_decoder().layers[0].self_attn.scaling *= 2  # captured again
    new_tokens(model, inputs, 2, hidrop_schedule="less")
    hidrop.restore(model)


def test_threads_have_schedules_of_their_own(
    model: Any, inputs: dict[str, Tensor], expected: dict[str, list[list[int]]]
) -> None:
    barrier, wrong = threading.Barrier(3), []

    def run(name: str, inside: bool) -> None:
        for _ in range(4):
            if inside:
                with hidrop.use(model, name):
                    barrier.wait()  # until all are in their blocks
                    found = new_tokens(model, inputs, 4)
            else:
                barrier.wait()
                found = new_tokens(model, inputs, 4, hidrop_schedule=name)
            if found != expected[name]:
                wrong.append(name)

    given = (("fast", False), ("less", True), ("full", True))
    threads = [threading.Thread(target=run, args=each) for each in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_does_not_inherit_a_block_and_a_line_says_so(
    inputs: dict[str, Tensor], expected: dict[str, list[list[int]]], lines: Any
) -> None:
    model, found = compiled(), []
    with hidrop.use(model, "full"):
        thread = threading.Thread(target=lambda: found.append(new_tokens(model, inputs, 4)))
        thread.start()
        thread.join()
    assert found == [expected["fast"]]
    said = [line for line in lines() if "threads do not inherit it" in line]
    assert len(said) == 1
    assert 'hidrop_schedule="name"' in said[0]


@torch.no_grad()
def test_a_cache_goes_on_under_the_schedule_of_its_prompt(
    inputs: dict[str, Tensor], lines: Any
) -> None:
    model = compiled()
    tokens = torch.tensor([[7], [8], [9]])
    alone = {name: model(**inputs, hidrop_schedule=name).past_key_values for name in NAMED}
    steps = {}
    for name, cache in alone.items():
        mixed, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        with hidrop.use(model, name):
            steps[name] = model(input_ids=tokens, past_key_values=cache).logits
        for other in NAMED:
            for again in (copy.deepcopy(mixed), copy.deepcopy(pickled)):
                found = model(input_ids=tokens, past_key_values=again, hidrop_schedule=other)
                assert torch.equal(found.logits, steps[name]), (name, other)
                assert [x.filled for x in again.layers] == [x.filled for x in cache.layers]
    assert len({layers_of(cache) for cache in alone.values()}) == 3
    assert any("goes on under it, not under" in line for line in lines())
    hidrop.compile(model, {"full": hidrop.Schedule(), "more": PRUNED}, backend="eager")
    with pytest.raises(hidrop.CacheError, match="filled under another schedule"):
        model(input_ids=tokens, past_key_values=alone["full"])


def layers_of(cache: Any) -> tuple[int, ...]:
    return tuple(layer.filled for layer in cache.layers)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({}, r"schedules=\{\} names none"),
        ({"": PRUNED}, r"name '' is no name; use letters"),
        ({"a.b": PRUNED}, r"name 'a\.b' is no name"),
        ({3: PRUNED}, r"name 3 is no name"),
        ({"hidrop-64": PRUNED}, r"'hidrop-64' is that of a preset, and is given to"),
        ({"fine": "", "identity": PRUNED}, r"in the schedule 'fine': cannot read"),
        ({"identity": PRUNED}, r"'identity' is that of a preset"),
        ({"fine": "identity", "deep": "exit=9"}, r"in the schedule 'deep': exit=9 but the model"),
        ({"inject": 2}, r"in the schedule 'inject': schedule is a int; pass"),
    ],
)
def test_wrong_schedules_leave_the_model_as_it_was(
    model: Any,
    schedules: Any,
    message: str,
    inputs: dict[str, Tensor],
    expected: dict[str, list[list[int]]],
) -> None:
    attributes = {name: id(value) for name, value in model.__dict__.items()}
    with pytest.raises(hidrop.ScheduleError, match=message):
        hidrop.compile(model, schedules, backend="eager")
    assert {name: id(value) for name, value in model.__dict__.items()} == attributes
    assert hidrop.schedules(model) == {name: parsed(s) for name, s in NAMED.items()}
    assert new_tokens(model, inputs, 4, hidrop_schedule="less") == expected["less"]


def test_a_preset_may_bear_its_own_name() -> None:
    model = compiled({"identity": "identity", "fastv": "fastv"})
    assert list(hidrop.schedules(model)) == ["identity", "fastv"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("slow", r"'slow' is no schedule of this model, which has 'fast', 'less', 'full'"),
        ("exit=9", r"exit=9 but the model has 4 layers"),
        (7, r"7 is no schedule of this model.*schedule is a int"),
        (DTOPK, "learns, and must be known when an optimizer is made; give it a name"),
    ],
)
def test_unknown_schedules_are_refused(
    model: Any, wanted: Any, message: str, inputs: dict[str, Tensor]
) -> None:
    peers = runtime_in(model).peers
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.use(model, wanted).__enter__()
    with pytest.raises(hidrop.HidropError, match=message):
        model.generate(**inputs, hidrop_schedule=wanted, max_new_tokens=1)
    with pytest.raises(hidrop.HidropError, match=message):
        model(**inputs, hidrop_schedule=wanted)
    assert runtime_in(model).peers == peers
    with pytest.raises(hidrop.HidropError, match=r"not compiled; call hidrop_fx\.compile first"):
        hidrop.use(tiny_llava(), "fast").__enter__()
    with pytest.raises(ValueError, match="hidrop_schedule"):
        tiny_llava().generate(**inputs, hidrop_schedule="fast", max_new_tokens=1)


def test_a_schedule_that_is_new_joins(
    inputs: dict[str, Tensor], expected: dict[str, list[list[int]]], lines: Any
) -> None:
    model = compiled(PRUNED)
    assert hidrop.schedules(model) == {"default": parsed(PRUNED)}
    new_tokens(model, inputs, 4)
    with counter.expect(captures=0):
        for wanted in (OTHER, parsed(OTHER)):
            with hidrop.use(model, wanted):
                assert new_tokens(model, inputs, 4) == expected["less"]
        assert new_tokens(model, inputs, 4, hidrop_schedule="default") == expected["fast"]
    assert sum("is new to this model" in line for line in lines()) == 1
    cache = model(**inputs, hidrop_schedule=OTHER).past_key_values
    for keep in range(1, 9):
        with hidrop.use(model, f"inject=1,prune=1:{keep}"):
            pass
    assert len(runtime_in(model).peers) == 9
    assert any("more than 8 schedules without a name" in line for line in lines())
    with pytest.raises(hidrop.CacheError, match="another schedule"):
        model(input_ids=torch.tensor([[7], [8], [9]]), past_key_values=cache)
    assert list(hidrop.schedules(model)) == ["default"]


def test_several_schedules_are_saved_and_loaded(
    tmp_path: Path, inputs: dict[str, Tensor], expected: dict[str, list[list[int]]]
) -> None:
    names = {**NAMED, "learned": DTOPK, "too": DTOPK}
    model = compiled(names)
    model.hidrop_ratios_learned.values.data.copy_(torch.tensor([0.2, 0.5]))
    model.hidrop_ratios_too.values.data.copy_(torch.tensor([0.3, 0.6]))
    with hidrop.use(model, "full"):
        model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / SCHEDULE_FILE).read_text())
    assert content["schedule"] == parsed(PRUNED).to_dict(), "older versions read the default one"
    assert list(content["schedules"]) == list(names)
    other: Any = hidrop.load(tiny_llava(), tmp_path, backend="eager")
    assert list(hidrop.schedules(other)) == list(names)
    assert torch.equal(other.hidrop_ratios_learned.values, model.hidrop_ratios_learned.values)
    assert torch.equal(other.hidrop_ratios_too.values, model.hidrop_ratios_too.values)
    for name, tokens in expected.items():
        assert new_tokens(other, inputs, 4, hidrop_schedule=name) == tokens
    runtime = runtime_of(other)
    assert runtime_of(hidrop.load(other, tmp_path)) is runtime, "it has these schedules already"
    hidrop.compile(other, PRUNED, backend="eager")
    assert not [name for name in other.__dict__["_modules"] if "ratios" in name]
    hidrop.save(other, tmp_path)
    assert "schedules" not in json.loads((tmp_path / SCHEDULE_FILE).read_text())
    assert not (tmp_path / RATIOS_FILE).exists()
    (tmp_path / SCHEDULE_FILE).write_text('{"schedule": {"exit": 2}, "schedules": [1]}')
    with pytest.raises(hidrop.HidropError, match=r"hidrop\.json is not what save_pretrained wrote"):
        hidrop.load(other, tmp_path)


def test_copies_have_the_schedules_too(
    inputs: dict[str, Tensor], expected: dict[str, list[list[int]]]
) -> None:
    model = compiled()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickled, copy.copy(model)):
        assert schedules_of(twin) is not schedules_of(model)
        with counter.expect(captures=1), hidrop.use(model, "full"):
            found = new_tokens(twin, inputs, 4, hidrop_schedule="full")
            assert found == expected["full"]
            assert new_tokens(twin, inputs, 4) == expected["fast"], "the block is the original's"
        stores = {id(runtime.programs.store) for runtime in runtime_in(twin).peers}
        assert len(stores) == 1


def test_reports_are_those_of_the_schedule(model: Any, inputs: dict[str, Tensor]) -> None:
    for name in ("less", "full"):
        with hidrop.use(model, name) as schedule:
            new_tokens(model, inputs, 2)
            report = hidrop.inspect(model)
            assert report.schedule == hidrop.explain(model, **inputs).schedule == schedule
            assert report.layers[-1].vision_tokens == (0 if name == "less" else 9)
            assert {e.calls for e in report.executables if e.name.startswith("decode")} != {0}
            assert f"{name}: {schedule}" in str(report)
            assert report.to_dict()["schedules"] == {n: str(parsed(s)) for n, s in NAMED.items()}
        again = hidrop.explain(model, schedule=name, **inputs)
        assert again.schedule == schedule
        assert hidrop.plan(hidrop.schedules(model)[name], model).schedule == schedule
        assert hidrop.explain(model, **inputs).schedule == parsed(PRUNED)


def test_warmup_is_of_the_schedule_in_use() -> None:
    model = compiled(on_new_shape="error")
    for name in ("less", "full"):
        with hidrop.use(model, name), counter.expect(programs=range(2, 4)):
            hidrop.warmup(model, [hidrop.Shape(text=4, new_tokens=2)], progress=False)
    assert {runtime.name: len(made_by(runtime)) > 0 for runtime in runtime_in(model).peers} == {
        "fast": False,
        "less": True,
        "full": True,
    }


def made_by(runtime: Any) -> list[Any]:
    return [e for c in runtime.programs.captures.values() for e in c.executables.values()]


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_follows_the_schedule(checkpointed: bool) -> None:
    model = compiled({"fast": PRUNED, "learned": DTOPK}).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    labelled = supervised(model, ROWS)
    for name, schedule in hidrop.schedules(model).items():
        alone = hidrop.compile(tiny_llava(), schedule, backend="eager").train()
        expected = alone(**labelled)
        expected.loss.backward()
        with hidrop.use(model, name):
            loss = model(**labelled).loss
        loss.backward()  # outside of the block
        torch.testing.assert_close(loss, expected.loss)
        found = {n.replace("_learned", ""): p.grad for n, p in model.named_parameters()}
        for parameter, value in alone.named_parameters():
            torch.testing.assert_close(found[parameter], value.grad, msg=f"{name} {parameter}")
        model.zero_grad()


def test_ratios_of_equal_schedules_stay_when_compiled_again() -> None:
    model = compiled({"a": DTOPK, "b": DTOPK + ",budget_weight=2.0", "c": PRUNED})
    a, b = model.hidrop_ratios, model.hidrop_ratios_b
    compiled_again = hidrop.compile(
        model, {"c": PRUNED, "b": DTOPK + ",budget_weight=2.0", "new": DTOPK}, backend="eager"
    )
    assert compiled_again.hidrop_ratios_b is b
    assert compiled_again.hidrop_ratios_new is a
    assert "hidrop_ratios" not in compiled_again._modules
    hidrop.restore(model)
    assert not [name for name in model._modules if "ratios" in name]
    assert set(vars(model)) == set(vars(tiny_llava()))


@pytest.mark.slow
def test_peft_and_trainer_work_with_several_schedules(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model: Any = peft.get_peft_model(tiny_llava(num_layers=3), config)
    hidrop.compile(model, {"fast": "inject=1,prune=2:3", "full": "identity"}, backend="eager")
    asked = batch(model, [[5, IMAGE, 7, 8]])
    with hidrop.use(model, "full"):
        full = model.generate(**asked, max_new_tokens=3, do_sample=False)
        trainer(model, tmp_path, max_steps=1).train()
    assert torch.equal(
        model.base_model.model.lm_head.weight, tiny_llava(num_layers=3).lm_head.weight
    )
    fresh: Any = peft.get_peft_model(tiny_llava(num_layers=3), config)
    assert torch.equal(fresh.generate(**asked, max_new_tokens=3, do_sample=False), full)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_llava(num_layers=3), tmp_path / "adapter")
    hidrop.load(again, tmp_path / "adapter", backend="eager")
    assert list(hidrop.schedules(again)) == ["fast", "full"]
    layout = runtime_in(model)
    with hidrop.use(model, "full"):
        assert runtime_in(model).last_layout is not None, "the steps ran under the schedule in use"
    assert layout.last_layout is None
