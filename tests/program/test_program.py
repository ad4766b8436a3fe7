"""Programs: parameters, inputs, and the check of layers after each pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from hidrop_fx import PassError, Schedule, passes
from hidrop_fx.pipeline import pipeline
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.program.variant import Variant
from tests.support.captured import FULL, WIDTH, CapturedModel
from tests.support.programs import ROWS, layout_and_tensors, run


def test_programs_leave_their_capture_unchanged(llama: CapturedModel) -> None:
    before = str(llama.captured.module.graph)
    for kind in ("train", "prefill", "decode"):
        llama.finished(kind, **FULL)
    assert str(llama.captured.module.graph) == before


def test_programs_read_the_models_own_parameters(llama: CapturedModel) -> None:
    program = llama.finished(**FULL)
    own = dict(llama.model.get_decoder().named_parameters())
    assert {
        n: p for n, p in program.module.named_parameters() if own[n] is p
    }.keys() == own.keys() - {"embed_tokens.weight"}


def test_a_layer_whose_hidden_states_nobody_reads_is_found(llama: CapturedModel) -> None:
    program = llama.program_before(passes.inject, **FULL)

    def skip_a_layer(program: Program, plan: Any, **options: Any) -> PassResult:
        program.regions[1].live_out.replace_all_uses_with(program.regions[0].live_out)
        return PassResult(matched=1)

    with pytest.raises(
        PassError, match=r"^after skip_a_layer, nothing reads the hidden states of layers\.1$"
    ):
        program.apply(skip_a_layer)
    assert [s.name for s in program.history] == ["captured", "split_streams"]


def test_a_layer_that_does_not_read_its_hidden_states_is_found(llama: CapturedModel) -> None:
    program = llama.program_before(passes.inject, **FULL)

    def forget_to_say_so(program: Program, plan: Any, **options: Any) -> PassResult:
        region = program.regions[2]
        doubled = program.call(torch.add, region.hidden, region.hidden, before=region.nodes[0])
        region.read(region.hidden, doubled)
        return PassResult(matched=1)

    with pytest.raises(
        PassError,
        match=r"^after forget_to_say_so, layers\.2 does not read add_\w+ \(.*\) \[aten\.add\.Tensor\] in "
        r"layers\.1",
    ):
        program.apply(forget_to_say_so)


def test_an_unknown_input_is_refused_with_the_names_of_all_inputs(llama: CapturedModel) -> None:
    program = llama.program(**FULL)
    with pytest.raises(
        PassError,
        match=r"^the graph has no input 'keys_9'; it has inputs_embeds, position_ids, mask$",
    ):
        program.placeholder_named("keys_9")


def test_sizes_captured_off_another_input_are_those_of_the_ids_that_a_slice_reads(
    llama: CapturedModel,
) -> None:
    """Export takes batch and length from any input that has them; tables of positions are made for other tokens."""
    size = torch.ops.aten.sym_size.int

    def off_the_embeddings(graph: fx.Graph) -> None:
        ids, embeds = (
            next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)
            for name in ("position_ids", "inputs_embeds")
        )
        read = next(user for user in ids.users if isinstance(user.meta["val"], torch.Tensor))
        value = read.meta["val"]
        known = {str(length): dim for dim, length in enumerate(embeds.meta["val"].shape[:2])}
        shape: list[Any] = []
        with graph.inserting_before(read.next):
            for length in value.shape:
                made = known.get(str(length), length)
                if str(length) in known:
                    made = graph.call_function(size, (embeds, made))
                    made.meta["val"] = length
                shape.append(made)
            expanded = graph.call_function(torch.ops.aten.expand.default, (read, shape))
        expanded.meta.update(read.meta)
        read.replace_all_uses_with(expanded, lambda user: user is not expanded)
        assert len(known.keys() & set(map(str, value.shape))) == 2

    edited = llama.edited(off_the_embeddings)
    programs = [llama.program("train", captured, **FULL) for captured in (llama.captured, edited)]
    for program in programs:
        for step, options in pipeline.passes_for("train", Variant()):
            program.apply(step, **options)
        program.module.recompile()
    embeds = torch.randn(2, len(ROWS[0]), WIDTH)
    _, tensors = layout_and_tensors(Schedule(**FULL), ROWS, embeds)
    states = [next(iter(run(program, tensors).values())) for program in programs]
    torch.testing.assert_close(states[0], states[1])
