"""Programs: parameters, inputs, and the check of layers after each pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hidrop_fx import PassError, passes
from hidrop_fx.program.program import PassResult, Program
from tests.support.captured import FULL, CapturedModel


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
