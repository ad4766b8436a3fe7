"""Symbolic sizes: forms of lengths are told apart from each other and from static sizes, in a program and in its bodies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hidrop_fx import PassError, Schedule
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.export import capture
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.outline import lower
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.program.symbols import Size, Symbols, _forms, _stand_in
from tests.support.models import tiny_llava

VOCABULARIES = (128_256, 151_936, 200_064, 262_144)
WIDTHS = (2048, 3584, 4096, 5120, 8192, 11_008, 13_824, 14_336, 18_944, 28_672, 49_152, 131_072)


def lengths(*names: str, static: Any = (*VOCABULARIES, *WIDTHS)) -> tuple[Symbols, list[Size]]:
    symbols = Symbols(static)
    return symbols, [symbols.new(name) for name in names]


def derived(batch: Size, text: Size, vision: Size) -> Iterator[tuple[Size, str]]:
    yield text, "text"
    yield text + 1, "text + 1"
    yield 1 + text, "text + 1"
    yield text - 1, "text - 1"
    yield text + 100, "text + 100"
    yield text + 0, "text"
    yield text * 2, "text * 2"
    yield 3 * text + 1, "text * 3 + 1"
    yield text // 2, "text // 2"
    yield text // 2 + 1, "text // 2 + 1"
    yield text // 9, "text // 9"
    yield text // 16, "text // 16"
    yield text + vision, "text + vision"
    yield text + vision + 1, "text + vision + 1"
    yield batch * text, "batch * text"
    yield batch * text + 1, "batch * text + 1"
    yield batch * (text + 1), "batch * (text + 1)"
    yield batch * (text // 4), "batch * (text // 4)"
    yield batch * 32, "batch * 32"
    yield batch * text * 4096, "batch * text * 4096"
    yield batch * text * vision, "batch * text * vision"


def test_a_number_is_the_size_that_arithmetic_made() -> None:
    symbols, (batch, text, vision) = lengths("batch", "text", "vision")
    for size, name in derived(batch, text, vision):
        found = symbols.decode(int(size))
        assert found is not None, name
        assert (found, found.name, size.name) == (size, name, name)
        assert symbols.is_symbolic(int(size))
        assert symbols.name(int(size)) == name


def test_sizes_are_numbers_in_shapes_and_keep_their_names_when_copied() -> None:
    _, (batch, text) = lengths("batch", "text")
    with FakeTensorMode():
        states = torch.empty(batch, text + 1, 8)
    assert states.shape == (batch, text + 1, 8)
    assert all(type(size) is int for size in states.shape)
    for other in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (other, other.name) == (text, "text")


@pytest.mark.parametrize("count", [3, 45])
def test_static_sizes_are_not_symbolic(count: int) -> None:
    symbols, made = lengths(*(f"length_{k}" for k in range(count)))
    for size in (*VOCABULARIES, *WIDTHS, *range(6_000)):
        assert symbols.decode(size) is None
        assert symbols.name(size) == str(size)
    assert len(set(made)) == count


def test_lengths_make_way_for_any_static_size() -> None:
    _, made = lengths(*"abcdefgh", static=())
    taken = [int(made[0]), made[1] + 3, made[2] // 2, made[3] * 40, made[4] + made[5]]
    symbols, others = lengths(*"abcdefgh", static=map(int, taken))
    assert not any(symbols.is_symbolic(int(size)) for size in taken)
    assert [symbols.name(int(size)) for size in others] == list("abcdefgh")


def test_no_form_of_a_length_is_a_form_of_another() -> None:
    made = [_stand_in(k) for k in range(48)]
    forms = [size for length in made for size in _forms(length)]
    forms += [a + b + more for k, a in enumerate(made) for b in made[:k] for more in (0, 1)]
    assert len(forms) == len(set(forms))
    # Scores of three lengths and 128 heads in fp32, the largest value there is.
    assert made[-1] ** 3 * 128 * 4 < 2**63


def test_a_size_of_a_parameter_that_comes_too_late_is_refused() -> None:
    symbols, (text,) = lengths("text")
    symbols.declare_static([97, 100_000_000], "head.weight")
    with pytest.raises(
        PassError, match=r"^head\.weight has the size \d+, which stands for 'text // 2'"
    ):
        symbols.declare_static([int(text // 2)], "head.weight")


# In programs.


@pytest.fixture(scope="module")
def llama() -> tuple[Any, CapturedDecoder]:
    model = tiny_llava(num_layers=3)
    return model, capture(model.get_decoder())


def program_of(llama: tuple[Any, CapturedDecoder], *custom: Any, **schedule: Any) -> Program:
    _, captured = llama
    plan = Plan.of(Schedule(**schedule), captured.num_layers)
    return build_program(captured, plan, "prefill", custom=custom)


def bodies_of(program: Program) -> dict[str, Any]:
    log = CompileLog()
    return lower(program, backend="eager", lowering="bodies", log=log, shared={}).bodies


class Head:
    """A pass that multiplies the hidden states behind layer 0 by a vocabulary, for both halves of it."""

    __name__ = "early_head"

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        self.weight = torch.empty(()).expand(vocabulary, width)  # one element of memory

    def __call__(self, program: Program, plan: Plan) -> PassResult:
        end, region = program.graph.output_node(), program.regions[0]
        weight = program.add_parameter("early_head", self.weight)
        logits = program.call(F.linear, region.live_out, weight, before=end, subgraph="logits_0")
        best = program.call(F.softmax, logits, -1, before=end, subgraph="best_0")
        program.returns({**program.outputs, "best": best})
        return PassResult(matched=1)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_vocabulary_in_the_graph_is_static(
    vocabulary: int, llama: tuple[Any, CapturedDecoder]
) -> None:
    program = program_of(llama, Head(vocabulary), inject=1, prune={2: 4})
    assert f"f32[batch, text, {vocabulary}] <- early_head" in program.history[-1].code
    bodies = bodies_of(program)
    (head,) = [b for b in bodies.values() if b.used_by == ["prefill logits_0"]]
    (best,) = [b for b in bodies.values() if b.used_by == ["prefill best_0"]]
    # Hidden states [B, S, D] and the weight [V, D]; then logits [B, S, V].
    assert head._symbolic == [(0, 1), ()]
    assert best._symbolic == [(0, 1)]


def test_a_vocabulary_that_stands_for_a_length_is_refused(
    llama: tuple[Any, CapturedDecoder],
) -> None:
    taken = int(program_of(llama, inject=1).segments[0].length // 2)
    with pytest.raises(
        PassError, match=rf"^early_head, which early_head adds, has the size {taken}, which stands"
    ):
        program_of(llama, Head(taken), inject=1)


def test_equal_bodies_are_shared_whatever_their_lengths(
    llama: tuple[Any, CapturedDecoder],
) -> None:
    program = program_of(llama, inject=1, prune={2: 4})
    layers = [b.used_by for b in bodies_of(program).values() if "layer" in b.name]
    assert sorted(map(len, layers)) == [1, 2]  # the filter layer is given its keys


def half(states: Tensor) -> Tensor:
    return states[:, ::2] + states[:, : (states.shape[1] + 1) // 2]


def halve(program: Program, plan: Plan) -> PassResult:
    """Merge the tokens of the last layer in pairs, beside the model's own output."""
    end = program.graph.output_node()
    halved = program.call(half, program.regions[-1].live_out, before=end, subgraph="half_2")
    normed = program.call(torch.neg, halved, before=end, subgraph="negated_2")
    program.returns({**program.outputs, "halved": normed})
    return PassResult(matched=1)


def test_half_a_length_is_symbolic(llama: tuple[Any, CapturedDecoder]) -> None:
    program = program_of(llama, halve, inject=1)
    assert "f32[batch, inject_1 // 2 + 1, 32]" in program.history[-1].code
    (negated,) = [b for b in bodies_of(program).values() if b.used_by == ["prefill negated_2"]]
    assert negated._symbolic == [(0, 1)]


def test_a_length_written_into_the_graph_is_refused(llama: tuple[Any, CapturedDecoder]) -> None:
    def cut(program: Program, plan: Plan) -> PassResult:
        states = program.regions[-1].live_out
        middle = int(program.segment_of(2).length) // 2
        end = program.graph.output_node()
        first = program.call(torch.narrow, states, 1, 0, middle, before=end)
        program.returns({**program.outputs, "first": first})
        return PassResult(matched=1)

    with pytest.raises(
        PassError, match=r"^cut writes the length 'inject_1 // 2' into narrow.* as a number"
    ):
        program_of(llama, cut, inject=1)
