"""Layers that convolve: prompts shorter than the kernel, pads, second turns, drafts, and what a schedule may not ask of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.capture.convolutions import mark_convolutions
from hidrop_fx.ops.convolution import CAPTURED_CONVOLUTION, causal_convolution, convolution_over
from tests.support.backbones import tiny_backbone
from tests.support.families import CASES, ROWS, make_batch
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, batch
from tests.support.runtimes import compiled_eagerly

WORDS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [8, IMAGE, 11, IMAGE, 3], [4, 5]]
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def one_by_one(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The rule, token by token."""
    width, out = weight.shape[2], torch.zeros_like(states)
    for t in range(states.shape[2]):
        for k in range(width):
            if t - width + 1 + k >= 0:
                out[:, :, t] += weight[:, 0, k] * states[:, :, t - width + 1 + k]
    return out + bias


@pytest.mark.parametrize("filled", [1, 2, 9])
def test_a_convolution_over_a_cache_is_that_over_the_tokens_that_each_row_has(filled: int) -> None:
    """Rows with tokens missing in between, and fewer of them than the kernel is wide."""
    generator = torch.Generator().manual_seed(filled)
    states = torch.randn(3, 1, filled, 6, generator=generator)
    weight, bias = torch.randn(6, 1, 4, generator=generator), torch.randn(6, generator=generator)
    shown = torch.rand(3, filled, generator=generator) < 0.6
    shown[:, -1] = True
    shown[0] = True
    halves = states.split(3, dim=3)
    torch.testing.assert_close(
        causal_convolution(states, *halves, weight, bias), one_by_one(states, weight, bias)
    )
    last = states[:, :, -1:]
    found = convolution_over(last, *halves, shown[:, None, None], weight, bias)
    for row in range(3):
        own = states[row : row + 1, :, shown[row]]
        wanted = one_by_one(own, weight, bias)[:, :, -1:]
        torch.testing.assert_close(found[row : row + 1], wanted)
    whole = convolution_over(last, *halves, None, weight, bias)
    torch.testing.assert_close(whole, one_by_one(states, weight, bias)[:, :, -1:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["lfm2", pytest.param("lfm3", marks=pytest.mark.families)])
def test_prompts_shorter_than_the_kernel_and_pads_change_no_answer(name: str) -> None:
    model = tiny_backbone(name)
    rows: list[list[int | str]] = [[5], [7, 8], [4, 5, 6, 7, 8, 9, 3, 4]]
    alone = [new_tokens(model, batch(model, [row]), 5)[0] for row in rows]
    with compiled_eagerly(model, Schedule()):
        for side in ("left", "right"):
            assert new_tokens(model, batch(model, rows, padding=side), 5) == alone


@torch.no_grad()
def test_a_bias_in_front_of_the_convolution_does_not_come_in_from_pads() -> None:
    """In Hugging Face's model it does: a padded row differs from the row alone, which is what ours equals."""
    model = tiny_backbone("lfm2_bias")
    rows: list[list[int | str]] = [[5, 6, 7, 8, 9, 3, 4], [4, 5]]
    inputs = batch(model, rows, padding="left")
    alone = [model(**batch(model, [row])).logits[0] for row in rows]
    theirs = model(**inputs).logits
    with compiled_eagerly(model, Schedule()):
        ours = model(**inputs).logits
    for row, wanted in enumerate(alone):
        torch.testing.assert_close(ours[row, -len(wanted) :], wanted, atol=2e-5, rtol=1e-4)
    assert (theirs[1, -2:] - alone[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_draft_that_is_taken_back_leaves_no_trace() -> None:
    model = tiny_backbone("lfm2")
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 7, 8, 7]])
    wanted = new_tokens(model, inputs, 8)
    with compiled_eagerly(model, Schedule()):
        asked = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        assert new_tokens(model, inputs, 8, **asked) == wanted


@torch.no_grad()
def test_the_cache_of_a_convolution_holds_the_last_tokens_of_a_prompt_and_those_behind_it() -> None:
    model = tiny_backbone("lfm2")
    inputs = batch(model, WORDS, padding="left")
    width = inputs["input_ids"].shape[1]
    with compiled_eagerly(model, Schedule()):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )  # fmt: skip
    assert [layer.filled for layer in out.past_key_values.layers] == [4, width + 2, width + 2, 4]


@torch.no_grad()
def test_several_tokens_behind_a_prompt_are_hugging_face_s() -> None:
    case = CASES["lfm2_vl"]
    model = case.make()
    inputs = make_batch(case, model, ROWS).inputs
    new = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], dim=1)}
    wanted = model(**{**whole, "attention_mask": mask}).logits[:, -3:]
    with compiled_eagerly(model, Schedule()):
        cache = model(**inputs).past_key_values
        found = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_are_pruned_at_a_convolution_by_what_it_reads() -> None:
    schedule = Schedule(inject=1, prune={3: 2}, score="state_change")
    model = hidrop.compile(tiny_backbone("lfm2"), schedule, backend="eager")
    found = hidrop.compare(model, new_tokens=3, **batch(model, WORDS))
    assert found.reference == "loop"
    assert found.ok, str(found)
    assert hidrop.explain(model, **batch(model, WORDS))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (
            Schedule(prune={3: 2}),
            hidrop.ScheduleError,
            r"prune layer 3 scores by 'last_token', which reads key, query, scale of layer 3.*layers 1, 2 attend",
        ),
        (
            Schedule(prune={3: 2}, score="state_change", merge="nearest_key"),
            hidrop.ScheduleError,
            r"the keys of merge='nearest_key' of layer 3",
        ),
        (
            Schedule(cache="snapkv(window=2,capacity=4)"),
            hidrop.UnsupportedModelError,
            r"LlavaForConditionalGeneration has convolutions \(layers 0, 3\), which have seen them",
        ),
        (
            Schedule(bottleneck=5),
            hidrop.UnsupportedModelError,
            r"bottleneck=5 takes tokens out of caches.*\(layers 0, 3\), which have seen them",
        ),
        (
            Schedule(prune={2: 2}, cache="retroactive(layer=2)"),
            hidrop.UnsupportedModelError,
            r"retroactive\(layer=2,first=0\).*\(layers 0\)",
        ),
        (
            Schedule(reads=(1, 3)),
            hidrop.UnsupportedModelError,
            r"has convolutions \(layers 3\), which attend to nothing",
        ),
    ],
    ids=str,
)
def test_what_a_convolution_cannot_do_is_refused(
    schedule: Schedule, error: type[Exception], message: str
) -> None:
    model = tiny_backbone("lfm2")
    with pytest.raises(error, match=message):
        hidrop.compile(model, schedule, backend="eager")
    assert not hidrop.is_compiled(model)


@torch.no_grad()
def test_caches_of_layers_between_convolutions_may_be_cut() -> None:
    schedule = Schedule(prune={2: 2}, cache="retroactive(layer=2,first=1)")
    model = hidrop.compile(tiny_backbone("lfm2"), schedule, backend="eager")
    found = hidrop.compare(model, new_tokens=3, **batch(model, WORDS))
    assert found.ok, str(found)


@pytest.mark.parametrize(
    ("padding", "groups", "ends"), [(1, 6, 0), (2, 1, 0), (2, 6, 1)], ids=["shift", "mix", "whole"]
)
def test_another_convolution_over_tokens_is_refused(padding: int, groups: int, ends: int) -> None:
    conv = nn.Conv1d(6, 6, 3, padding=padding, groups=groups)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, states: Tensor) -> Tensor:
            return self.conv(states)[:, :, ends : states.shape[2]]

    def graph_of(module: nn.Module) -> fx.Graph:
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
        return torch.export.export(module, (torch.ones(3, 6, 11),), dynamic_shapes=(dims,)).graph

    with pytest.raises(hidrop.HidropError, match="is no causal convolution of each channel"):
        mark_convolutions(graph_of(Layer()))
    conv, ends = nn.Conv1d(6, 6, 3, padding=2, groups=6), 0
    graph = graph_of(Layer())
    mark_convolutions(graph)
    assert [n for n in graph.nodes if n.target is CAPTURED_CONVOLUTION]
