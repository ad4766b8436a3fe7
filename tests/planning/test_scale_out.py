"""A training step on several GPUs: bytes and times by hand, the page's two examples, what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import hidrop_fx as hidrop
from hidrop_fx.planning.scale_out import UnitTimes, step_seconds
from tests.support.paths import ROOT

# Heads of q: 8 wide together, of k and v: 4. A layer: q, o 64 numbers each; k, v 32 each; MLP 3 x 128.
TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "dtype_bytes": 2,
    "vision_tokens": 6,
    "text_tokens": 3,
    "batch_size": 5,
}
NUMBERS = 64 + 64 + 32 + 32 + 3 * 128
LINK: dict[str, Any] = {"bandwidth": 1000.0, "link_efficiency": 0.5, "latency": 0.25}
COMPUTE: dict[str, Any] = {"flops": 4000.0, "efficiency": 0.25}


def across(schedule: str = "inject=1,exit=3", **given: Any) -> Any:
    sizes = {name: given.pop(name, value) for name, value in TINY.items()}
    cluster = hidrop.Cluster(**{"world_size": 4, **LINK, **COMPUTE, **given})
    return hidrop.plan(schedule, **sizes).across(cluster)


def flops(tokens: int) -> int:
    """Of one row in one layer: projections and MLP, and causal attention."""
    return 2 * (tokens * NUMBERS + 8 * tokens * (tokens + 1))


def test_bytes_and_arithmetic_of_a_layer_by_hand() -> None:
    made = across()
    gather = 0.25 + NUMBERS * 2 * 3 / 4 / 500.0
    assert [unit.gather for unit in made.times()] == pytest.approx([gather] * 4)
    assert [unit.regather for unit in made.times()] == pytest.approx([gather] * 4)
    assert [unit.reduce for unit in made.times()] == pytest.approx([gather] * 4)
    computed = [5 * flops(n) / 1000.0 for n in (3, 9, 9, 3)]
    assert [unit.forward for unit in made.times()] == pytest.approx(computed)
    assert [unit.backward for unit in made.times()] == pytest.approx([2 * c for c in computed])
    # Gathers beside the layer before; in backward two beside two, which are never below 2 x 17 s.
    assert made.seconds == pytest.approx(3 * sum(computed) + 3 * gather)
    assert made.identity_seconds == pytest.approx(3 * 4 * 5 * flops(9) / 1000.0 + 3 * gather)
    assert made.possible == pytest.approx(4 * flops(9) / (2 * flops(3) + 2 * flops(9)))


def test_layers_of_few_tokens_wait_for_the_link() -> None:
    made = across(batch_size=1, bandwidth=100.0)
    gather = (
        0.25 + NUMBERS * 2 * 3 / 4 / 50.0
    )  # 17.53 s; a layer of 3 tokens takes 3.6 s, of 9: 11.8 s
    assert made.below == (0, 1, 2, 3)
    last = flops(3) / 1000.0
    forward = gather + 3 * gather + last
    backward = gather + gather + 2 * 2 * gather + 1 * gather + gather
    assert made.seconds == pytest.approx(forward + backward)
    assert made.speedup < 1.1 < 1.5 < made.possible


@pytest.mark.parametrize(
    ("change", "gather", "regather", "reduce", "backward"),
    [
        ({"gradient_bytes": 4}, 2, 2, 4, 2),
        ({"recompute": True}, 2, 2, 2, 3),
        ({"reshard_after_forward": False}, 2, 0, 2, 2),
        ({"strategy": "zero3"}, 2, 2, 2, 2),
        ({"strategy": "ddp"}, 0, 0, 4, 2),  # an all-reduce is two of them
    ],
)
def test_strategies_differ_in_what_they_send(
    change: dict[str, Any], gather: int, regather: int, reduce: int, backward: int
) -> None:
    made = across(**change)
    unit, seconds = made.times()[1], lambda b: 0.25 * bool(b) + NUMBERS * b * 3 / 4 / 500.0
    found = (unit.gather, unit.regather, unit.reduce, unit.backward)
    expected = (*map(seconds, (gather, regather, reduce)), backward * unit.forward)
    assert found == pytest.approx(expected)
    tokens = made.breakeven_tokens
    a_token = 2 * NUMBERS / 1000.0
    link = seconds(regather) + seconds(reduce)
    assert tokens == pytest.approx((seconds(gather) / a_token, link / a_token / backward))


def test_hybrid_sharding_gathers_within_nodes_and_reduces_shards_between_them() -> None:
    nodes = {"node_size": 4, "node_bandwidth": 40.0, "node_link_efficiency": 0.5, "world_size": 12}
    flat, hybrid = across(**nodes), across(**nodes, strategy="hsdp")
    assert flat.times()[0].gather == pytest.approx(0.25 + NUMBERS * 2 * 11 / 12 / 20.0)
    assert flat.times()[0].between == 0
    assert hybrid.times()[0].gather == pytest.approx(0.25 + NUMBERS * 2 * 3 / 4 / 500.0)
    assert hybrid.times()[0].between == pytest.approx(0.25 + 2 * NUMBERS * 2 / 4 * 2 / 3 / 20.0)
    saved, gain = flat.alternatives()["hybrid sharding"]
    assert saved == pytest.approx(flat.seconds - hybrid.seconds)
    assert gain == pytest.approx(flat.identity_seconds / hybrid.seconds)
    assert "hybrid sharding" not in across().alternatives()


def test_tensor_parallelism_reduces_hidden_states_beside_nothing() -> None:
    made = across(strategy="tp", world_size=2, num_key_value_heads=2)
    numbers = NUMBERS + 64
    hidden = 5 * 9 * 8 * 2  # rows, tokens, width, bytes
    inside = 2 * (0.25 + 2 * hidden / 2 / 500.0)
    forward = 5 * 2 * (9 * numbers + 8 * 9 * 10) / 1000.0 / 2 + inside
    assert made.times()[1].forward == pytest.approx(forward)
    assert made.times()[1].backward == pytest.approx(2 * (forward - inside) + inside)
    assert made.breakeven_tokens is None
    assert made.alternatives() == {}
    assert "break-even: none" in str(made)


def test_a_step_of_units_by_hand() -> None:
    def unit(forward: float, gather: float, reduce: float, between: float = 0) -> UnitTimes:
        return UnitTimes(
            forward=forward,
            backward=2 * forward,
            gather=gather,
            regather=gather,
            reduce=reduce,
            between=between,
        )

    units = (unit(1, 2, 3), unit(5, 4, 6), unit(2, 1, 1, 20))
    forward = 2 + max(1, 4) + max(5, 1) + 2
    backward = 1 + max(4, 4) + max(10, 2 + 1) + max(2, 6, 20) + 3
    assert step_seconds(units) == forward + backward
    assert step_seconds(units[:1]) == 2 + 1 + 2 + 2 + 3
    assert step_seconds((unit(0, 0, 0, 7),)) == 7


def test_first_layers_in_one_unit_save_latency_and_lose_overlap() -> None:
    eight = {"num_layers": 8, "batch_size": 1}
    slow_start = across("inject=5", **eight, latency=100.0)
    assert slow_start.shallow_group == 5
    saved, _ = slow_start.alternatives()["layers 0-4 in one unit"]
    # Four gathers fewer, four in backward, and four reductions; one gather more waits in front of everything.
    assert saved == pytest.approx(slow_start.seconds - slow_start.grouped_seconds(5))
    assert saved > 5 * 100.0
    quick = across("inject=5", **eight, latency=0.0)
    assert quick.shallow_group == 1
    assert quick.alternatives()["layers 0-4 in one unit"][0] < 0
    first = slow_start.times(first=5)[0]
    assert first.gather == pytest.approx(100.0 + 5 * NUMBERS * 2 * 3 / 4 / 500.0)
    assert first.forward == pytest.approx(5 * flops(3) / 1000.0)
    with pytest.raises(hidrop.HidropError, match="9 first layers in one unit: there are 1 to 8"):
        quick.times(first=9)


def test_rows_that_restore_the_gain_are_the_fewest() -> None:
    rows = across(batch_size=1, bandwidth=100.0).rows_to_restore
    assert rows > 1
    for count, enough in ((rows, True), (rows - 1, False)):
        made = across(batch_size=count, bandwidth=100.0)
        assert (made.speedup >= 0.95 * made.possible) == enough
    assert across(bandwidth=1e-6).rows_to_restore is None
    assert "no 4096 rows restore 95%" in str(across(bandwidth=1e-6))


def test_plan_takes_the_cluster_and_prints_it() -> None:
    made = hidrop.plan("inject=1,exit=3", **TINY, world_size=4, bandwidth="pcie4", strategy="fsdp")
    assert made.scale_out == made.across(hidrop.Cluster(world_size=4, bandwidth=32e9))
    assert str(made).endswith(str(made.scale_out))
    assert json.loads(json.dumps(made.to_dict()))["scale_out"] == made.scale_out.to_dict()
    alone = hidrop.plan("inject=1,exit=3", **TINY)
    assert alone.scale_out is None
    assert "scale_out" not in alone.to_dict()
    one = alone.across(hidrop.Cluster(world_size=1))
    assert one.speedup == pytest.approx(one.possible)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"world_size": 0},
            "world_size=0 must be an integer of 1 or more",
        ),
        (
            {"world_size": 8, "strategy": "pp"},
            "strategy='pp'; use one of ddp, fsdp, zero3, hsdp, tp",
        ),
        (
            {"world_size": 8, "bandwidth": "wifi"},
            "bandwidth='wifi' is no rate in bytes a second above 0, such as 450e9, and none of nvlink",
        ),
        ({"world_size": 8, "bandwidth": -1.0}, "bandwidth=-1.0 is no rate"),
        ({"world_size": 8, "node_bandwidth": "nan"}, "node_bandwidth='nan' is no rate"),
        (
            {"world_size": 8, "strategy": "hsdp"},
            "world_size=8 must be a multiple of node_size=8, twice",
        ),
        ({"world_size": 16, "strategy": "hsdp"}, "pass node_bandwidth=..., such as '400gb'"),
        (
            {"world_size": 2, "strategy": "tp"},
            "divides the 1 key-value heads among world_size=2 GPUs",
        ),
        ({"strategy": "fsdp"}, "strategy='fsdp' is about several GPUs: pass world_size=..., too"),
    ],
)
def test_what_is_no_cluster_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(hidrop.HidropError, match=re.escape(message)):
        hidrop.plan("inject=1,exit=3", **TINY, **given)


def test_efficiencies_are_shares() -> None:
    with pytest.raises(hidrop.HidropError, match="link_efficiency=75 must be above 0 and at most"):
        hidrop.Cluster(world_size=8, link_efficiency=75)
    with pytest.raises(hidrop.HidropError, match="flops=0 must be above 0"):
        hidrop.Cluster(world_size=8, flops=0)


# The page: LLaVA-1.5-7B.

PAGE = (ROOT / "docs" / "scale-out.md").read_text()
LLAVA_7B: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vision_tokens": 576,
}
WEIGHTS = 4 * 4096**2 + 3 * 4096 * 11008


def layer_ms(tokens: int, rows: int) -> float:
    """Forward pass of a layer: at half of 989 TFLOP/s."""
    multiply_adds = tokens * WEIGHTS + 4096 * tokens * (tokens + 1)
    return 2 * multiply_adds * rows / (989e12 / 2) * 1e3


def step_ms(costs: Any, rows: int, gather: float, link: float, between: float = 0.0) -> float:
    """A step by the page's formula, in a loop of its own; the scores of prunes are the plan's own figures."""
    scored = [0.0] * 32
    for event in costs.plan.events:
        scored[event.layer] += costs.event_flops[event.name] * rows / (989e12 / 2) * 1e3
    computed = [layer_ms(n, rows) + s for n, s in zip(costs.tokens, scored, strict=True)]
    total = gather + sum(max(c, gather) for c in computed[:-1]) + computed[-1]
    total += gather
    for i in reversed(range(32)):
        beside = gather * (i > 0) + (link - gather) * (i < 31)
        total += max(2 * computed[i], beside, between * (i < 30))
    return total + max(link - gather, between) + between


def test_the_page_has_one_node_of_eight_by_hand() -> None:
    gather = 0.02 + WEIGHTS * 2 * 7 / 8 / (450e9 * 0.75) * 1e3
    costs = hidrop.plan("hidrop-64", **LLAVA_7B, batch_size=8, world_size=8, bandwidth="nvlink")
    made = costs.scale_out
    assert made is not None
    tokens = gather / 1e3 * (989e12 / 2) / (2 * WEIGHTS)
    assert made.breakeven_tokens == pytest.approx((tokens, tokens))
    seconds = step_ms(costs, 8, gather, 2 * gather)
    identity = step_ms(costs.identity, 8, gather, 2 * gather)
    assert made.seconds * 1e3 == pytest.approx(seconds)
    assert made.identity_seconds * 1e3 == pytest.approx(identity)
    assert identity == pytest.approx(3 * 32 * layer_ms(640, 8) + 3 * gather)  # nothing waits
    for said in (
        f"{WEIGHTS * 2 / 1e6:.1f} MB",
        f"{gather:.2f} ms",
        f"{tokens:.0f} tokens a GPU and layer forward",
        f"{seconds:.1f} ms, identity {identity:.1f} ms: {identity / seconds:.2f}x",
    ):
        assert said in PAGE, said
    assert str(made) in PAGE


def test_the_page_has_two_nodes_by_hand() -> None:
    flat = 0.02 + WEIGHTS * 2 * 15 / 16 / (50e9 * 0.85) * 1e3
    within = 0.02 + WEIGHTS * 2 * 7 / 8 / (450e9 * 0.75) * 1e3
    between = 0.02 + 2 * WEIGHTS * 2 / 8 / 2 / (50e9 * 0.85) * 1e3
    costs = hidrop.plan(
        "hidrop-64", **LLAVA_7B, batch_size=16, world_size=16, node_bandwidth="400gb"
    )
    made = costs.scale_out
    assert made is not None
    seconds = step_ms(costs, 16, flat, 2 * flat)
    identity = step_ms(costs.identity, 16, flat, 2 * flat)
    hybrid = step_ms(costs, 16, within, 2 * within, between)
    assert made.seconds * 1e3 == pytest.approx(seconds)
    assert made.identity_seconds * 1e3 == pytest.approx(identity)
    saved, gain = made.alternatives()["hybrid sharding"]
    assert saved * 1e3 == pytest.approx(seconds - hybrid)
    assert gain == pytest.approx(identity / hybrid)
    for said in (
        f"{flat:.2f} ms",
        f"{seconds:.1f} ms, identity {identity:.1f} ms: {identity / seconds:.2f}x",
        f"hybrid sharding: saves {seconds - hybrid:.2f} ms a step, {identity / hybrid:.2f}x",
    ):
        assert said in PAGE, said
    assert str(made) in PAGE
