"""The least time of a plan on a device: counts by hand, bounds, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hidrop_fx as hidrop
from hidrop_fx.planning.roofline import Step, Work

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
    "dtype_bytes": 2,
}
# Heads of q: 8 wide together, of k and v: 4. Weights of a layer: q, o 64 each; k, v 32 each; MLP 3 x 128.
WEIGHTS = 2 * (64 + 64 + 32 + 32 + 384)
DEVICE = hidrop.Device(name="slow", flops=1000.0, bandwidth=100.0)


def costs(**options: Any) -> Any:
    given = {"vision_tokens": 6, "text_tokens": 3, "batch_size": 2, **SIZES, **options}
    return hidrop.plan("inject=1,exit=3", **given)


def test_prefill_work_is_weights_once_and_the_tokens_of_each_layer() -> None:
    text, both, gone, head = costs().prefill_work
    assert (text.name, both.name, gone.name, head.name) == ("0", "1-2", "3", "head")
    per_token = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    assert text.flops == 2 * (3 * per_token + 2 * 8 * (3 * 4 // 2) * 2)
    assert both.flops == 2 * 2 * (9 * per_token + 2 * 8 * (9 * 10 // 2) * 2)
    cached = 2 * 4 * 2 * 2  # K and V, 4 wide, 2 bytes, 2 rows
    assert text.bytes == WEIGHTS + 3 * cached
    assert both.bytes == 2 * (WEIGHTS + 9 * cached)
    assert gone == Work(name="3", flops=text.flops, bytes=text.bytes)
    assert head == Work(name="head", flops=2 * 2 * 8 * 10, bytes=2 * 8 * 10)


def test_decode_work_reads_the_weights_and_each_layers_own_cache() -> None:
    text, both, _, head = costs().decode_work
    per_token = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    cached = 2 * 4 * 2 * 2
    assert text.flops == 2 * (per_token + 2 * 2 * 8 * 4)  # itself and three others
    assert text.bytes == WEIGHTS + 4 * cached
    assert both.flops == 2 * 2 * (per_token + 2 * 2 * 8 * 10)
    assert both.bytes == 2 * (WEIGHTS + 10 * cached)
    assert head.flops == 2 * 2 * 8 * 10


def test_no_vocabulary_no_head() -> None:
    assert [work.name for work in costs(vocab_size=0).decode_work] == ["0", "1-2", "3"]


def test_room_for_new_tokens_is_not_traffic() -> None:
    assert costs(new_tokens=50).prefill_work == costs().prefill_work
    assert costs(new_tokens=50).decode_work == costs().decode_work


def test_the_longer_of_arithmetic_and_traffic_counts() -> None:
    step = Step(
        device=DEVICE,
        work=(Work(name="a", flops=2000, bytes=100), Work(name="b", flops=1000, bytes=300)),
    )
    assert [step.bound_of(work) for work in step.work] == ["compute", "memory"]
    assert step.seconds == 2.0 + 3.0


def test_a_schedule_is_held_against_the_identity() -> None:
    made = costs()
    roofline = made.on(DEVICE)
    assert roofline.prefill.work == made.prefill_work
    assert roofline.identity_prefill == made.identity.on(DEVICE).prefill
    assert roofline.prefill_seconds < roofline.identity_prefill.seconds
    assert roofline.decode_seconds < roofline.identity_decode.seconds
    found = json.loads(json.dumps(roofline.to_dict()))
    assert found["prefill"]["seconds"] == roofline.prefill_seconds
    assert found["device"] == {
        "name": "slow",
        "flops": 1000.0,
        "bandwidth": 100.0,
        "launch": 4e-6,
    }


def test_the_table_has_a_line_for_each_run_of_layers() -> None:
    lines = str(costs().on("H100")).splitlines()
    assert lines[0] == "least time on H100 (800 TFLOP/s, 3 TB/s), ms"
    assert [line.split()[0] for line in lines[2:]] == [
        "0",
        "1-2",
        "3",
        "head",
        "all",
        "identity",
        "ratio",
    ]


def test_llava_on_an_h100_is_bound_by_arithmetic_in_batches_and_by_weights_alone() -> None:
    sizes = {
        "num_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vision_tokens": 576,
    }
    eight = hidrop.plan("hidrop-64", **sizes, batch_size=8).on("h100")
    assert {eight.prefill.bound_of(w) for w in eight.prefill.work} == {"compute"}
    assert {eight.decode.bound_of(w) for w in eight.decode.work} == {"memory"}
    one = hidrop.plan("hidrop-64", **sizes).on("h100")
    assert one.prefill.bound_of(one.prefill.work[0]) == "memory"  # 64 tokens


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: costs().on("a100"),
            "device='a100': its rates are not known; use one of h100, h200",
        ),
        (lambda: hidrop.Device(name="d", flops=0, bandwidth=1), "flops=0 of d must be above 0"),
        (
            lambda: hidrop.Device(name="d", flops=1, bandwidth=-1),
            "bandwidth=-1 of d must be above 0",
        ),
    ],
)
def test_unknown_devices_and_rates_are_refused(make: Any, message: str) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        make()
