"""The inject: vision tokens join the text at one layer."""

from __future__ import annotations

import pytest

from hidrop_fx import passes
from hidrop_fx.capture.regions import tensor_inputs
from hidrop_fx.ops import tokens
from tests.support.captured import CapturedModel
from tests.support.graphs import (
    calls,
    grown,
    only,
    own_nodes,
    segments,
    total,
)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_inject_merges_text_and_vision_at_one_layer(llama: CapturedModel, layer: int) -> None:
    program = llama.program_before(passes.inject, inject=layer)
    hidden, nodes = program.regions[layer].hidden, [own_nodes(r) for r in program.regions]
    inputs = program.inputs
    expected = {
        "placeholder": 3, "take_tokens": 2, "merge_index": 1, "merge_tokens": 1, "merge_columns": 1,
    }  # fmt: skip
    if layer == 0:
        # No layer sees the text alone, so what was gathered for it is dead.
        expected = total(expected, take_tokens=-2)
    assert grown(program, passes.inject) == expected
    assert program.inputs == [*inputs, "vision_embeds", "vision_columns", f"slots_inject_{layer}"]
    merged = only(calls(program.graph, tokens.merge_tokens))
    index = only(calls(program.graph, tokens.merge_index))
    assert merged.args == (hidden, program.placeholder_named("vision_embeds"), index)
    assert program.regions[layer].hidden is merged
    assert segments(program) == [("text", 0), (f"inject_{layer}", layer)]
    assert program.segments[-1].columns is only(calls(program.graph, tokens.merge_columns))
    assert [own_nodes(r) for r in program.regions] == nodes
    for region in program.regions:
        cos = next(iter(program.segment_of(region.layer).live_ins.values()))
        assert cos in tensor_inputs(region.nodes)
