"""Generation on static buffers: the runner of CUDA graphs, by plain calls on a CPU and by graphs on a GPU."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support import counter
from tests.support.devices import devices
from tests.support.generation import new_tokens
from tests.support.graphed import NEW, ROWS, Models, reference_tokens
from tests.support.models import EOS, IMAGE, PRUNED, batch, tiny_llava
from tests.support.runtimes import graph_runner

schedules = pytest.mark.parametrize(
    "schedule",
    [
        "identity",
        PRUNED,
        PRUNED + ",positions=compact",
        "prune=2:4,positions=group",
        "prune=1:0.5",
    ],
)


@devices
@schedules
@pytest.mark.parametrize("padding", ["left", "right"])
def test_graphed_greedy_tokens_equal_the_reference(
    model_on: Models, device: str, schedule: str, padding: Any
) -> None:
    """Across a step of the entries: more new tokens than a multiple."""
    model, plain = model_on(device, schedule), model_on(device, None)
    inputs = batch(model, ROWS, padding=padding)
    assert new_tokens(model, inputs, NEW) == reference_tokens(plain, model, inputs)
    assert any(entry.fixed for entry in graph_runner(model).entries.values())


@devices
@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3"])
def test_graphed_tokens_of_every_backbone_equal_the_reference(
    model_on: Models, device: str, backbone: str
) -> None:
    """Sliding windows, grouped heads, normalised queries."""
    model, plain = model_on(device, PRUNED, backbone), model_on(device, None, backbone)
    inputs = batch(model, ROWS)
    assert new_tokens(model, inputs, NEW) == reference_tokens(plain, model, inputs)


@devices
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_graphed_modes_of_generate_equal_plain_calls(
    model_on: Models, device: str, options: dict[str, Any]
) -> None:
    """What reorders, repeats and crops the cache gives the same without static buffers."""
    graphed = model_on(device, PRUNED)
    plain = model_on(device, PRUNED, cuda_graphs=False)
    rows = [[5, 6, IMAGE, 7, 5, 6]] if "prompt_lookup_num_tokens" in options else ROWS
    inputs = batch(graphed, rows)
    answers = []
    for model in (graphed, plain):
        torch.manual_seed(0)
        answers.append(new_tokens(model, inputs, NEW, **options))
    assert answers[0] == answers[1]


@devices
def test_a_second_call_records_nothing(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED)
    lengths = [[[5, 6, IMAGE, 7]], [[5, IMAGE, 7]], [[9, 9, 9, IMAGE, 7, 8]]]
    new_tokens(model, batch(model, lengths[0]), NEW)
    with counter.expect(compiled=0, recorded=0):
        for rows in lengths:
            new_tokens(model, batch(model, rows), NEW)


@devices
def test_two_conversations_that_take_turns_keep_their_caches(model_on: Models, device: str) -> None:
    """One set of buffers serves both: each moves out for the other and in again."""
    model = model_on(device, PRUNED)
    rows = [[[5, 6, IMAGE, 7]], [[8, IMAGE, 9, 4, IMAGE]]]
    alone = [stepwise(model, batch(model, r), 12) for r in rows]
    alone = [[next(steps) for _ in range(12)] for steps in alone]
    both = [stepwise(model, batch(model, r), 12) for r in rows]
    together: list[list[Any]] = [[], []]
    for _ in range(12):
        for index, steps in enumerate(both):
            together[index].append(next(steps))
    assert together == alone


def stepwise(model: Any, inputs: dict[str, Tensor], steps: int) -> Iterator[list[int]]:
    with torch.no_grad():
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(dim=-1)
        yield token.flatten().tolist()
        with torch.no_grad():
            output = model(input_ids=token, past_key_values=output.past_key_values)


@devices
def test_graphed_calls_from_threads_equal_calls_in_turn(model_on: Models, device: str) -> None:
    model, plain = model_on(device, PRUNED), model_on(device, None)
    work = [batch(model, [row]) for row in ROWS]
    wanted = [reference_tokens(plain, model, inputs) for inputs in work]
    found: list[Any] = [None] * len(work)

    def run(index: int) -> None:
        found[index] = new_tokens(model, work[index], NEW)

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == wanted


@devices
def test_a_copied_cache_shares_its_prefix(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    with torch.no_grad():
        prefix = model(**inputs, use_cache=True).past_key_values
    answers = []
    for _ in range(2):
        cache = copy.deepcopy(prefix)
        output = None
        for token in (8, 9, 10):
            ids = torch.tensor([[token]], device=device)
            with torch.no_grad():
                output = model(input_ids=ids, past_key_values=cache)
        answers.append(output.logits)
    assert torch.equal(*answers)
    assert prefix.get_seq_length() == inputs["input_ids"].shape[1]


@devices
@torch.no_grad()
def test_a_cache_that_is_filled_again_equals_a_new_one(model_on: Models, device: str) -> None:
    """With as many tokens in other rows: what was known of its buffers no longer holds."""
    model = model_on(device, PRUNED)
    cache = HidropCache(max_length=40)
    last = []
    for rows in ([[5, 6, IMAGE, 7]], [[5, 6, IMAGE, 7], [8, IMAGE, 9, 4]]):
        cache.reset()
        output = model(**batch(model, rows), past_key_values=cache)
        for _ in range(2):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=token, past_key_values=cache)
        last.append(output.logits[:, -1])
    torch.testing.assert_close(last[1][:1], last[0], rtol=1e-4, atol=1e-4)


@devices
def test_graphs_recorded_in_inference_mode_run_outside_it(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED, max_graphs=63)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    with torch.inference_mode():
        first = new_tokens(model, inputs, NEW)
    assert new_tokens(model, inputs, NEW) == first


@devices
def test_outputs_outlive_the_next_replay(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED)
    with torch.no_grad():
        first = model(**batch(model, [[5, 6, IMAGE, 7]]))
        kept = first.logits.clone()
        model(**batch(model, [[9, 8, IMAGE, 4]]))
    assert torch.equal(first.logits, kept)


@devices
def test_graphs_on_replaced_buffers_are_recorded_again(
    model_on: Models, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = model_on(device, PRUNED, max_graphs=62), model_on(device, None)
    short, long = batch(model, [[5, IMAGE]]), batch(model, [[5, IMAGE, *range(10, 40)]] * 4)
    new_tokens(model, short, 4)
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        assert new_tokens(model, long, NEW) == reference_tokens(plain, model, long)
    assert "the KV buffers were replaced" in caplog.text
    assert new_tokens(model, short, NEW) == reference_tokens(plain, model, short)


@devices
def test_replay_refuses_buffers_at_another_address(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    new_tokens(model, inputs, NEW)
    graphs = graph_runner(model)
    entry = next(b for b in graphs.entries.values() if b.fixed)
    moved = {k: v.clone() for k, v in entry.inputs.items()}
    with pytest.raises(CacheError, match=r"not where the .* graph was recorded"):
        entry.replay_forward(moved)


@devices
def test_the_least_recently_used_graph_is_evicted(
    model_on: Models, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = model_on(device, PRUNED, max_graphs=2), model_on(device, None)
    inputs = batch(model, ROWS)
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        assert new_tokens(model, inputs, NEW) == reference_tokens(plain, model, inputs)
    assert len(graph_runner(model).entries) == 2
    assert "was evicted: 2 are kept" in caplog.text


@devices
def test_restore_releases_the_buffers(device: str) -> None:
    model = hidrop.compile(
        tiny_llava("qwen2").to(device), PRUNED, backend="eager", cuda_graphs=True
    )
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    graphs = graph_runner(model)
    assert graphs.pool.nbytes > 0
    held = cache.layers[0].keys[:, :, : cache.layers[0].filled].clone()
    hidrop.restore(model)
    assert (graphs.pool.nbytes, len(graphs.entries)) == (0, 0)
    assert torch.equal(cache.layers[0].keys[:, :, : cache.layers[0].filled], held)


def test_calls_that_run_without_a_graph_are_logged(
    model_on: Models, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_on("cpu", PRUNED, max_graphs=61)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    with caplog.at_level(logging.INFO, logger="hidrop_fx"), torch.no_grad():
        cache = model(**inputs, use_cache=True, output_hidden_states=True).past_key_values
        model(input_ids=torch.tensor([[8, 9]]), past_key_values=cache)
    assert "output_hidden_states: these prompts run without a graph" in caplog.text
    assert "several tokens at once after a prompt" in caplog.text


def test_packed_sequences_are_refused(model_on: Models) -> None:
    model = model_on("cpu", PRUNED)
    with pytest.raises(InputError, match="packed"):
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_graphed_rows_that_end_early_equal_plain_calls(model_on: Models) -> None:
    """After an end of sequence transformers goes on with padding in that row."""
    graphed = model_on("cpu", PRUNED)
    plain = model_on("cpu", PRUNED, cuda_graphs=False)
    inputs = batch(graphed, ROWS)
    stop = new_tokens(plain, inputs, NEW)[0][3]
    options = {"eos_token_id": [EOS, stop], "pad_token_id": 0}
    assert new_tokens(graphed, inputs, NEW, **options) == new_tokens(plain, inputs, NEW, **options)


def test_a_failed_recording_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = hidrop.compile(tiny_llava("qwen2"), PRUNED, backend="eager", cuda_graphs=True)
    inputs = batch(model, ROWS)
    tries: list[str] = []

    def fail(self: GraphRunner, run: Any, *_: Any) -> Any:
        tries.append(run.program.kind)
        raise torch.AcceleratorError("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphRunner, "_record", fail)
    with caplog.at_level(logging.WARNING, logger="hidrop_fx"):
        for _ in range(2):
            assert new_tokens(model, inputs, NEW) == reference_tokens(
                tiny_llava("qwen2"), model, inputs
            )
    assert sorted(tries) == ["decode", "prefill"]
    assert caplog.text.count("runs without a graph: operation not permitted") == 2


def test_graphs_release_replaced_weights() -> None:
    model = hidrop.compile(tiny_llava("llama"), PRUNED, backend="eager", cuda_graphs=True)
    inputs = batch(model, ROWS)
    new_tokens(model, inputs, 2)
    old = weakref.ref(model.model.language_model.layers[0].mlp.up_proj.weight)
    model.load_state_dict(tiny_llava("llama").state_dict(), assign=True)
    new_tokens(model, inputs, 2)
    gc.collect()
    assert old() is None
