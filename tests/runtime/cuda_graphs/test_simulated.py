"""What a GPU would do with recordings: two devices, streams, captures that fail, memory of a pool.

    python -m pytest -p tests.support.simulated_cuda.plugin tests/runtime/cuda_graphs/test_simulated.py

On a machine with GPUs, most of these pass there too.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import hidrop_fx as hidrop
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.transfer import to_device, to_host
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, PRUNED, batch, random_labels, tiny_llava
from tests.support.runtimes import graph_runner
from tests.support.simulated_cuda import streams, tensors
from tests.support.simulated_cuda.install import DEVICES, is_installed
from tests.support.simulated_cuda.storages import FINDINGS, WAITS

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="needs the simulated CUDA"),
    pytest.mark.filterwarnings("ignore:index from the host"),
]

NEW = 6
ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
devices = pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(DEVICES)])


@pytest.fixture(autouse=True)
def no_hazards() -> Iterator[None]:
    """Nothing that a GPU would let pass silently."""
    FINDINGS.clear()
    yield
    gc.collect()
    found = [text for text in FINDINGS if not text.startswith("index from the host")]
    assert not found, found


def graphed(device: str = "cuda", schedule: str = PRUNED, **options: Any) -> Any:
    options = {"backend": "eager", "cuda_graphs": True, "bucket_multiple": 8} | options
    return hidrop.compile(tiny_llava("qwen2").to(device), schedule, **options)


@functools.cache
def plain() -> Any:
    """The same model, plainly on the CPU."""
    return hidrop.compile(tiny_llava("qwen2"), PRUNED, backend="eager")


def plain_tokens(rows: Any = ROWS) -> Any:
    return new_tokens(plain(), batch(plain(), rows), NEW)


def training_inputs(model: Any, seed: int = 0) -> dict[str, Tensor]:
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 9], [8, IMAGE, 9, 7]], padding="right", seed=seed)
    return inputs | {"labels": random_labels(inputs, seed=seed)}


def gradients(model: Any, steps: int = 1, **modes: Any) -> dict[str, Tensor]:
    """Accumulate over steps, and return the gradients on the CPU."""
    model.zero_grad(set_to_none=True)
    for seed in range(steps):
        model(**training_inputs(model, seed)).loss.backward()
    named = model.named_parameters()
    found = {n: p.grad.cpu().clone() for n, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@functools.cache
def plain_gradients(steps: int = 1) -> dict[str, Tensor]:
    plain().train()
    found = gradients(plain(), steps)
    plain().eval()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


# Devices.


@devices
@pytest.mark.parametrize("overlap", [False, True])
def test_a_model_generates_on_any_device(device: str, overlap: bool) -> None:
    """Recordings, KV buffers and the side stream go by the model's device, not by the current one."""
    model = graphed(device, overlap_vision=overlap)
    inputs = batch(model, ROWS)
    for _ in range(2):
        assert new_tokens(model, inputs, NEW) == plain_tokens()
    kinds = {entry.kind for entry in graph_runner(model).entries.values()}
    assert kinds == {"prefill graph", "decode graph"}
    assert torch.cuda.current_device() == 0


@devices
def test_a_model_trains_on_any_device(device: str) -> None:
    model = graphed(device).train()
    for _ in range(2):
        assert_close(gradients(model, steps=2), plain_gradients(steps=2))
    assert graph_runner(model).entries


def test_models_on_two_devices_take_turns() -> None:
    first, second = graphed("cuda:0"), graphed("cuda:1")
    for model in (first, second, first, second):
        assert new_tokens(model, batch(model, ROWS), NEW) == plain_tokens()


def test_a_model_that_moves_to_another_device_is_recorded_there() -> None:
    model = graphed("cuda:0")
    new_tokens(model, batch(model, ROWS), NEW)
    model.to("cuda:1")
    assert new_tokens(model, batch(model, ROWS), NEW) == plain_tokens()


# Captures that fail.


def waits(states: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        states.sum().item()
    return states


def copies(states: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        return states + torch.ones(1, 1, states.shape[2]).to(states.device) * 0
    return states


def overflows(states: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise torch.OutOfMemoryError("CUDA out of memory")
    return states


def unjoined(states: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        side = torch.cuda.Stream(states.device)
        side.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(side):
            states + 1
    return states


def breaking(kind: str, function: Callable[[Tensor], Tensor]) -> Any:
    """A custom pass that puts a function behind the last layer of programs of one kind."""

    def break_capture(program: Program, plan: Plan) -> PassResult:
        if program.kind != kind:
            return PassResult(matched=0)
        last: fx.Node = program.regions[-1].live_out
        users = list(last.users)
        with program.graph.inserting_after(last):
            new = program.graph.call_function(function, (last,))
        new.meta.update(last.meta)
        for user in users:
            user.replace_input_with(last, new)
        return PassResult(matched=1)

    return break_capture


@pytest.fixture
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="hidrop_fx")
    return caplog


@pytest.mark.parametrize("failing", [waits, copies, overflows, unjoined])
def test_a_capture_that_fails_costs_one_graph(failing: Any, caught: Any) -> None:
    """The other kind of call is recorded, and the process is as it was."""
    streams.GENERATOR_STAYS_CAPTURED = True
    model = graphed(passes=[breaking("prefill", failing)])
    inputs = batch(model, ROWS)
    before = torch.cuda.current_stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hidrop_fx.runtime.cuda_graphs.capturing.GENERATOR_STAYS_CAPTURED", True)
        for _ in range(2):
            assert new_tokens(model, inputs, NEW) == plain_tokens()
    assert [record.getMessage()[:17] for record in caught.records] == ["the prefill graph"]
    assert torch.cuda.current_stream() is before
    assert [entry.kind for entry in graph_runner(model).entries.values()] == ["decode graph"] * len(
        graph_runner(model).entries
    )
    assert graph_runner(model).entries
    torch.rand(2, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.parametrize("failing", [waits, copies, overflows])
def test_training_whose_capture_fails_runs_plainly(failing: Any, caught: Any) -> None:
    model = graphed(passes=[breaking("train", failing)]).train()
    for _ in range(2):
        assert_close(gradients(model), plain_gradients())
    assert [record.getMessage()[:15] for record in caught.records] == ["the train graph"]


def test_a_recording_that_is_collected_during_a_capture_does_not_break_it(caught: Any) -> None:
    """As one in a reference cycle is, whenever Python's collector runs."""
    old: list[Any] = []

    def collects(states: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            old.clear()
        return states

    model = graphed(passes=[breaking("prefill", collects)])
    new_tokens(model, batch(model, ROWS[:1]), NEW)
    old += graph_runner(model).entries.values()
    graph_runner(model).entries.clear()
    assert new_tokens(model, batch(model, ROWS), NEW) == plain_tokens()
    assert not old
    assert not caught.records


def test_an_error_of_the_plain_run_too_reaches_the_caller() -> None:
    def fails(states: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    model = graphed(passes=[breaking("prefill", fails)])
    with pytest.raises(RuntimeError, match="no such kernel"):
        new_tokens(model, batch(model, ROWS), NEW)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()


# Training.


def test_accumulators_that_something_holds_do_not_matter() -> None:
    """DDP makes them on the default stream, before any recording."""
    model = graphed().train()
    held = tensors.hold_accumulators(model.parameters())
    for _ in range(2):
        assert_close(gradients(model, steps=2), plain_gradients(steps=2))
    assert held
    assert graph_runner(model).entries


def test_a_loss_of_before_that_lives_on_does_not_matter(caught: Any) -> None:
    model = graphed().train()
    other = graphed(cuda_graphs=False).train()
    kept = other(**training_inputs(other)).loss
    assert_close(gradients(model), plain_gradients())
    assert "without a graph" not in caught.text
    assert kept.requires_grad


@pytest.mark.parametrize("overlap", [False, True])
def test_recordings_made_under_autocast_outlive_its_region(overlap: bool) -> None:
    model = graphed(overlap_vision=overlap)
    serial = graphed(cuda_graphs=False)
    inputs = batch(model, ROWS)
    found = []
    for each in (model, serial, model):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(new_tokens(each, inputs, NEW))
        gc.collect()
    assert found[0] == found[1] == found[2]


def test_training_under_autocast_casts_the_weights_in_every_replay() -> None:
    losses = {}
    for graphs in (False, True):
        model = graphed(cuda_graphs=graphs).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = losses[graphs] = []
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**training_inputs(model)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.item())
    assert losses[True][0] != losses[True][2]
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-2, atol=2e-2)


def test_a_second_backward_does_not_read_what_the_first_one_overwrote() -> None:
    model = graphed().train()
    loss = model(**training_inputs(model)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(hidrop.HidropError, match="second backward"):
        loss.backward()


# Waits of the host.


def test_a_decode_step_waits_for_the_device_once_at_most() -> None:
    """`generate` waits on its own account; whether mask and position ids go on is one question."""
    model = graphed()
    inputs = batch(model, ROWS)
    new_tokens(model, inputs, NEW)
    ours = {}
    for count in (NEW, NEW + 4):
        WAITS.clear()
        new_tokens(model, inputs, count)
        ours[count] = sum(
            n for line, n in WAITS.items() if "decode.py" in line or "token_log" in line
        )
    assert ours[NEW + 4] - ours[NEW] <= 4


@torch.no_grad()
def test_a_prompt_crosses_to_the_device_a_few_times() -> None:
    """Its layout in one piece."""
    model = graphed()
    inputs = batch(model, ROWS)
    model(**inputs)
    WAITS.clear()
    model(**inputs)
    assert sum(WAITS.values()) <= 12, WAITS


def test_tensors_of_any_kind_cross_together() -> None:
    given = [
        torch.arange(7).view(1, 7),
        torch.tensor([True, False, True]),
        torch.tensor(2.5),
        torch.zeros(0, 4),
        torch.randn(3, 5).to(torch.bfloat16).T,
    ]
    there = to_device(given, torch.device("cuda", 1))
    assert all(value.device == torch.device("cuda", 1) for value in there)
    for value, moved in zip(given, there, strict=True):
        assert moved.dtype == value.dtype
        assert torch.equal(moved.cpu(), value)
    WAITS.clear()
    back = to_host(there[:2])
    assert [value.tolist() for value in back] == [value.tolist() for value in given[:2]]
    assert sum(WAITS.values()) == 1


# Streams and memory.


def test_calls_without_a_cache_on_two_streams_wait_for_each_other() -> None:
    model = graphed()
    rows = [batch(model, ROWS, seed=seed) for seed in range(2)]
    wanted = []
    with torch.no_grad():
        for inputs in rows:
            wanted.append(model(**inputs, use_cache=False).logits.cpu())
        torch.cuda.synchronize()
        sides = [torch.cuda.Stream() for _ in rows]
        found = []
        for side, inputs in zip(sides, rows, strict=True):
            with torch.cuda.stream(side):
                found.append(model(**inputs, use_cache=False).logits)
        torch.cuda.synchronize()
    for each, logits in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.cpu(), logits)


def test_training_steps_on_two_streams_wait_for_each_other() -> None:
    model = graphed().train()
    expected = plain_gradients(steps=2)
    gradients(model)
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    for seed, side in enumerate([torch.cuda.Stream(), torch.cuda.Stream()]):
        with torch.cuda.stream(side):
            model(**training_inputs(model, seed)).loss.backward()
        torch.cuda.synchronize()
    named = model.named_parameters()
    assert_close({n: p.grad.cpu() for n, p in named if p.grad is not None}, expected)


def test_requests_on_two_threads_and_streams_keep_their_answers() -> None:
    model = graphed()
    rows = [[row] for row in ROWS[:1] + ROWS[2:]]
    work = [batch(model, each) for each in rows]
    wanted = [plain_tokens(each) for each in rows]
    for inputs in work:
        new_tokens(model, inputs, NEW)
    torch.cuda.synchronize()
    found: list[Any] = [None] * len(work)

    def run(index: int) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            found[index] = new_tokens(model, work[index], NEW)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()  # or the model's weights would be freed in use
    assert found == wanted


def stop_recording(model: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        hidrop.restore(model)


def grow_elsewhere(model: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        prefilled(model, ROWS)


def prefilled(model: Any, rows: Any) -> Any:
    """Prefill on the current stream, as soon as the default one is done, and return the cache."""
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    with torch.no_grad():
        return model(**batch(model, rows), use_cache=True).past_key_values


@pytest.mark.parametrize("replace", [stop_recording, grow_elsewhere])
def test_kv_buffers_that_another_stream_may_still_use_are_not_reused(replace: Any) -> None:
    model = graphed()
    prefilled(model, [[5, IMAGE, 7]])  # allocates on the default stream
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        prefilled(model, [[5, IMAGE, 7]])
    replace(model)
    gc.collect()
    found = list(FINDINGS)
    torch.cuda.synchronize()
    assert not found


def select_a_row(cache: Any) -> None:
    cache.batch_select_indices(torch.tensor([1], device="cuda"))


def copy_it(cache: Any) -> None:
    copy.deepcopy(cache)


def decode_on_it(model: Any, cache: Any) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([[3]] * 2, device="cuda"), past_key_values=cache)


@pytest.mark.parametrize("use", [select_a_row, copy_it, decode_on_it])
def test_what_an_evicted_cache_holds_is_not_reused_while_its_stream_reads_it(use: Any) -> None:
    """It was moved to memory of the stream whose call evicted it, and goes on with its own."""
    model = graphed()
    own, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(own):
        cache = prefilled(model, ROWS[:2])
    with torch.cuda.stream(other):
        kept = prefilled(model, ROWS[:2])
    with torch.cuda.stream(own):
        use(*(model, cache) if use is decode_on_it else (cache,))
    del cache
    gc.collect()
    found = list(FINDINGS)
    torch.cuda.synchronize()
    assert not found
    assert kept.layers


def test_all_recordings_share_one_stream() -> None:
    model = graphed()
    before = len(streams.MADE)
    for rows in (ROWS * 2, ROWS, [[5, IMAGE, 6]]):
        new_tokens(model, batch(model, rows), NEW)
    assert len(graph_runner(model).entries) > 3
    # And the tower's.
    assert len(streams.MADE) - before <= 2


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
def test_a_tower_that_moved_in_memory_is_recorded_again(part: str) -> None:
    model = graphed(overlap_vision=True)
    inputs = batch(model, ROWS)
    assert new_tokens(model, inputs, NEW) == plain_tokens()
    module = getattr(model.model, part)
    module.load_state_dict({n: v.clone() for n, v in module.state_dict().items()}, assign=True)
    gc.collect()
    assert new_tokens(model, inputs, NEW) == plain_tokens()


def test_a_tower_whose_hooks_changed_is_recorded_again() -> None:
    model = graphed(overlap_vision=True)
    inputs = batch(model, ROWS)
    new_tokens(model, inputs, NEW)
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda *given: given[2] * 0)
    changed = new_tokens(model, inputs, NEW)
    handle.remove()
    handle = plain().model.multi_modal_projector.register_forward_hook(lambda *given: given[2] * 0)
    assert changed == plain_tokens()
    handle.remove()
    assert new_tokens(model, inputs, NEW) == plain_tokens()


def test_a_graph_that_was_evicted_frees_nothing_in_use() -> None:
    model = graphed(max_graphs=1)
    side = torch.cuda.Stream()
    for rows in ([[5, IMAGE, 6]], [[5, IMAGE, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9]]) * 2:
        inputs = batch(model, rows)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            new_tokens(model, inputs, 2)
    torch.cuda.synchronize()
