"""Attention: causal where it can be, by a gathered mask where it must."""

from __future__ import annotations

from hidrop_fx import passes
from hidrop_fx.ops.attention import (
    causal_attention,
    masked_attention,
)
from hidrop_fx.ops.masks import MaskRule, rule_mask
from tests.support.captured import FULL, CapturedModel
from tests.support.graphs import (
    calls,
    grown,
)


def test_attention_is_causal_without_a_mask(llama: CapturedModel) -> None:
    program = llama.program_before(passes.attention, **FULL)
    old = [region.attention for region in program.regions]
    arguments = [n.args for n in old]
    stacks = [n.meta["nn_module_stack"] for n in old]
    assert grown(program, passes.attention) == {"causal_attention": 4, "attention.default": -4}
    new = calls(program.graph, causal_attention)
    assert [region.attention for region in program.regions] == new
    assert [n.args for n in new] == [(*a[:3], *a[4:6]) for a in arguments]
    assert [n.meta["nn_module_stack"] for n in new] == stacks
    assert all(n in r.nodes for n, r in zip(new, program.regions, strict=True))
    assert program.history[-1].result.note == "0 layers with a mask"
    assert not program.placeholder_named("mask").users


def test_attention_reads_the_gathered_mask_of_its_segment(mistral_window: CapturedModel) -> None:
    program = mistral_window.program_before(
        passes.attention, masks=(("mask", MaskRule(window=5)),), **FULL
    )
    assert grown(program, passes.attention) == {"masked_attention": 4, "attention.default": -4}
    masks = [n.args[3] for n in calls(program.graph, masked_attention)]
    assert masks == calls(program.graph, rule_mask)
    assert [n.args[0] for n in calls(program.graph, rule_mask)] == [
        s.columns for s in program.segments
    ]
    assert program.history[-1].result.note == "4 layers with a mask"


def test_only_layers_with_a_window_read_a_mask(qwen_window: CapturedModel) -> None:
    masks = (("mask_sliding_attention", MaskRule(window=5)),)
    program = qwen_window.program_before(passes.attention, masks=masks, **FULL)
    program.apply(passes.attention)
    targets = [region.attention.target for region in program.regions]
    assert targets == [causal_attention, masked_attention] * 2
