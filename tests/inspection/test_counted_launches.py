"""Launches counted for a plan, held against those of calls, and against hand-made arithmetic where they are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.lowering.launches import launches
from hidrop_fx.planning.launch_counts import LaunchCounts, StepLaunches
from hidrop_fx.runtime.cuda_graphs.entry import GraphEntry
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import runtime_in

SCHEDULE = "inject=1,prune=2:2,exit=3"
ROWS = [[5, 6, IMAGE, 6, 7, 8], [7, IMAGE, 8, 9]]


def planned(model: Any, schedule: str = SCHEDULE, **sample: Any) -> Any:
    return hidrop.plan(schedule, model, **{"text_tokens": 5, "dtype_bytes": 4, **sample})


@contextmanager
def copies_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the copies around the replays of each kind of program, in the last call of it."""
    found: dict[str, int] = {}
    copy, replay = torch._foreach_copy_, GraphEntry.replay_forward
    count = 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return copy(*args)

    def watched(self: GraphEntry, inputs: Any) -> Any:
        nonlocal count
        count = 0
        outputs = replay(self, inputs)
        found[self._run.program.kind] = count
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", counted)
        patch.setattr(GraphEntry, "replay_forward", watched)
        yield found


@pytest.mark.parametrize(("backbone", "window"), [("llama", None), ("qwen3", 4)])
def test_what_is_counted_for_a_plan_is_what_calls_launch(
    backbone: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava(backbone, sliding_window=window)
    costs = planned(model, batch_size=2)
    found = hidrop.count_launches(model, costs)
    if window is None:
        assert hidrop.count_launches(model.config, costs) == found
    hidrop.compile(model, SCHEDULE, backend="eager", lowering="bodies", cuda_graphs=True)
    with copies_counted(monkeypatch) as copies:
        new_tokens(model, batch(model, ROWS), 3)
    (capture,) = runtime_in(model).programs.captures.values()
    for (kind, _), made in capture.executables.items():
        step: StepLaunches = getattr(found, kind)
        assert step.total - step.head == launches(made).total
        assert step.recorded == 1 + copies[kind] + step.head
    hidrop.restore(model)


def test_prunes_count_with_the_layer_that_they_are_before() -> None:
    model = tiny_llava("llama")
    found = hidrop.count_launches(model, planned(model))
    first, injected, pruned, gone = found.prefill.runs
    assert first == injected == gone
    assert pruned > 2 * first  # it scores and selects
    # Without a prune, and in a decode step, every layer launches the same.
    whole = found.identity_prefill.runs
    assert whole == (4 * first,)
    assert len(set(found.decode.runs)) == 1
    assert found.identity_decode.runs == (sum(found.decode.runs),)


def test_masks_of_several_rows_and_norms_of_sixteen_bits_launch_more() -> None:
    model = tiny_llava("llama")
    one = hidrop.count_launches(model, planned(model))
    two = hidrop.count_launches(model, planned(model, batch_size=2))
    assert one.decode.total < two.decode.total
    assert one.decode.recorded == two.decode.recorded  # recorded steps take masks
    assert one.prefill == two.prefill
    half = hidrop.count_launches(model.config, planned(model, dtype_bytes=2))
    assert half.prefill.total > one.prefill.total  # norms are computed in 32 bits


def test_a_model_is_left_as_it_was() -> None:
    model = hidrop.compile(tiny_llava("llama"), SCHEDULE, backend="eager")
    attention = model.config.get_text_config()._attn_implementation
    expected = new_tokens(model, batch(model, ROWS), 2)
    hidrop.count_launches(model, planned(model))
    assert model.config.get_text_config()._attn_implementation == attention
    assert new_tokens(model, batch(model, ROWS), 2) == expected
    assert len(runtime_in(model).programs.captures) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: hidrop.count_launches(model, planned(model, num_layers=6)),
            "the plan is for 6 layers and LlavaForConditionalGeneration has 4",
        ),
        (
            lambda model: hidrop.count_launches(
                model.config.get_text_config(), planned(model, dtype_bytes=2)
            ),
            "no model can be made from a LlamaConfig",
        ),
        (
            lambda model: hidrop.count_launches(model.config, planned(model, dtype_bytes=1)),
            "dtype_bytes=1: a program is made in 16 bits",
        ),
        (
            lambda model: planned(model, "identity").on(
                "h100", launches=hidrop.count_launches(model, planned(model))
            ),
            "4 runs of layers were counted for another plan than this one of 1",
        ),
    ],
    ids=["layers", "config", "dtype", "plan"],
)
def test_what_cannot_be_counted_is_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        make(tiny_llava("llama"))


def counted(runs: tuple[int, ...], between: int) -> StepLaunches:
    return StepLaunches(runs=runs, between=between, head=1, replay=5)


def test_launches_bound_a_run_of_layers_where_the_host_needs_longer() -> None:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "vision_tokens": 6,
    }
    # A layer: 2 * (4 * 64 + 3 * 128) = 1280 bytes of weights, 1.28 s; the head's 160 bytes: 0.16 s.
    device = hidrop.Device(name="slow", flops=1e9, bandwidth=1000.0, launch=0.1)
    made = hidrop.plan("exit=1", **sizes, text_tokens=3)
    decode = made.on(device).decode
    first, second, head = (decode.seconds_of(work) for work in decode.work)
    assert 1.28 < second < first < 2.0
    found = LaunchCounts(
        prefill=counted((40, 12), 3),
        decode=counted((20, 9), 2),
        identity_prefill=counted((80,), 3),
        identity_decode=counted((40,), 2),
    )
    roofline = made.on(device, launches=found)
    assert roofline.decode == decode  # the least time is as it was
    bounds = [decode.bound_of(work, n) for work, n in zip(decode.work, (20, 9, 1), strict=True)]
    assert bounds == ["launches", "memory", "memory"]
    data = json.loads(json.dumps(roofline.to_dict()))["launches"]
    assert data["decode"]["total"] == 20 + 9 + 2 + 1
    assert data["decode"]["seconds"] == pytest.approx(0.1 * 32)
    assert data["decode"]["recorded_seconds"] == pytest.approx(first + second + head)
    assert data["identity"]["decode"]["total"] == 43
    lines = str(roofline).splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line.split()[0] for line in table[2:9]] == [
        *("0", "1", "head", "between", "all", "identity", "recorded")
    ]
    assert table[2].split() == ["0", "40", "4000.000", "launches", "20", "2000.000", "launches"]
    assert table[-1] == (
        f"expected of a decode: 3200.00 ms without a graph, bound by its launches; {decode.seconds * 1e3:.2f} ms recorded"
    )
