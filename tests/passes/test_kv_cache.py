"""The KV cache: prefill writes it, decode attends over it."""

from __future__ import annotations

from hidrop_fx import passes
from hidrop_fx.ops.attention import (
    cached_attention,
)
from hidrop_fx.passes.kv_cache import write_kv
from tests.support.captured import FULL, HEAD, KV_HEADS, LAYERS, CapturedModel
from tests.support.graphs import (
    calls,
    grown,
)


def test_prefill_writes_the_keys_and_values_that_its_attention_reads(llama: CapturedModel) -> None:
    program = llama.program_before(passes.kv_cache, "prefill", **FULL)
    inputs = program.inputs
    assert grown(program, passes.kv_cache) == {"placeholder": 8, "write_kv": 8}
    names = [f"{name}_{k}" for k in range(LAYERS) for name in ("keys", "values")]
    assert program.inputs == [*inputs, *names]
    writes = calls(program.graph, write_kv)
    assert program.effects == set(writes)
    read = [a for r in program.regions for a in r.attention.args[1:3]]
    assert sorted((str(n.args[0]), n.args[1]) for n in writes) == sorted(
        zip(names, read, strict=True)
    )
    for k in range(LAYERS):
        batch, heads, length, width = program.placeholder_named(f"keys_{k}").meta["val"].shape
        assert (batch, heads, width) == (program.batch, KV_HEADS, HEAD)
        assert length == program.segment_of(k).length


def test_kv_writes_outlive_dead_code_removal(llama: CapturedModel) -> None:
    program = llama.finished("prefill", **FULL)
    assert len(calls(program.graph, write_kv)) == 8


def test_decode_attends_over_its_buffers(llama: CapturedModel) -> None:
    program = llama.program_before(passes.kv_cache, "decode", **FULL)
    inputs = program.inputs
    old = [region.attention.args for region in program.regions]
    assert grown(program, passes.kv_cache) == {
        "placeholder": 12, "cached_attention": 4, "attention.default": -4,
    }  # fmt: skip
    per_layer = zip(["text", "inject_1", "prune_2", "exit_3"], range(LAYERS), strict=True)
    names = [
        n for segment, k in per_layer for n in (f"slots_{segment}", f"keys_{k}", f"values_{k}")
    ]
    assert program.inputs == [*inputs, *names]
    for k, region in enumerate(program.regions):
        assert region.attention.target is cached_attention
        assert region.attention.args[:3] == old[k][:3]
        assert [str(a) for a in region.attention.args[3:6]] == [
            *names[3 * k + 1 : 3 * k + 3], names[3 * k],
        ]  # fmt: skip
        assert region.attention.args[6:] == (None, old[k][4])


def test_layers_of_one_segment_share_slots_and_mask(llama: CapturedModel) -> None:
    program = llama.program_before(passes.kv_cache, "decode", inject=1)
    inputs = program.inputs
    program.apply(passes.kv_cache, masked=True)
    added = program.inputs[len(inputs) :]
    assert [n for n in added if not n.startswith(("keys", "values"))] == [
        "slots_text", "mask_text", "slots_inject_1", "mask_inject_1",
    ]  # fmt: skip
    masks = [region.attention.args[6] for region in program.regions]
    inject = program.placeholder_named("mask_inject_1")
    assert masks == [program.placeholder_named("mask_text"), inject, inject, inject]


def test_a_segment_that_no_layer_sees_has_no_inputs_in_decode(llama: CapturedModel) -> None:
    program = llama.program_before(passes.kv_cache, "decode", inject=0, prune={0: 2})
    program.apply(passes.kv_cache)
    assert [n for n in program.inputs if n.startswith("slots")] == ["slots_prune_0"]


def test_layers_with_a_window_have_their_own_mask_in_decode(qwen_window: CapturedModel) -> None:
    program = qwen_window.program_before(passes.kv_cache, "decode", inject=2)
    program.apply(passes.kv_cache, masked=True)
    assert [n for n in program.inputs if n.startswith("mask_") and "attention" not in n] == [
        "mask_text", "mask_text_window_4", "mask_inject_2", "mask_inject_2_window_4",
    ]  # fmt: skip
    assert [str(region.attention.args[6]) for region in program.regions] == [
        "mask_text", "mask_text_window_4", "mask_inject_2", "mask_inject_2_window_4",
    ]  # fmt: skip
