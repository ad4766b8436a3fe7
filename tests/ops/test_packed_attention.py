"""Attention over rows end to end: on a CPU by a plain kernel in the place of the real ones."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.errors import HidropError, UnsupportedModelError
from hidrop_fx.ops import packed_attention
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.devices import on_cuda
from tests.support.models import IMAGE, PRUNED, batch, random_labels, tiny_llava
from tests.support.reference import reference_generate

ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 8


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> Tensor:
    """What the kernels compute; what they leave unwritten is not a number."""
    out = torch.full_like(query, float("nan"))
    groups = query.shape[1] // key.shape[1]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        rows = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        out = out.index_copy(0, torch.arange(start, end), rows.transpose(0, 1))
    return out


@pytest.fixture
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_attention.KERNELS, "varlen", row_by_row)
    monkeypatch.setattr("hidrop_fx.api.check_attention", lambda *_: None)


def packed_model(backbone: str, schedule: str = PRUNED) -> Any:
    return hidrop.compile(tiny_llava(backbone), schedule, backend="eager", attention="varlen")


@pytest.mark.usefixtures("plain_kernel")
@pytest.mark.parametrize("backbone", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("schedule", ["identity", PRUNED, "prune=2:4,positions=compact"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_packed_attention_generates_like_the_reference(
    backbone: str, schedule: str, padding: Any
) -> None:
    model = packed_model(backbone, schedule)
    inputs = batch(model, ROWS, padding=padding)
    rule = runtime_of(model).schedule
    expected = reference_generate(tiny_llava(backbone), rule, inputs, NEW)
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected
    names = {n.target.__name__ for n in _prefill(model).graph.nodes if n.op == "call_function"}
    assert "packed_attention" in names


def _prefill(model: Any) -> Any:
    (capture,) = runtime_of(model).programs.captures.values()
    return next(e.program for e in capture.executables.values() if e.program.kind == "prefill")


@pytest.mark.usefixtures("plain_kernel")
def test_packed_attention_gives_the_gradients_of_padded_attention() -> None:
    model, plain = packed_model("qwen2"), tiny_llava("qwen2")
    hidrop.compile(plain, PRUNED, backend="eager")
    inputs = batch(model, ROWS, padding="right")
    inputs |= {"labels": random_labels(inputs, seed=0)}
    for each in (model, plain):
        each.train()(**inputs).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_kernels_need_cuda_and_half_precision() -> None:
    with pytest.raises(UnsupportedModelError, match=r"on cpu in torch\.float32"):
        hidrop.compile(tiny_llava("llama"), PRUNED, attention="flash_attn")
    with pytest.raises(
        HidropError, match="attention='flash'; use one of sdpa, cudnn, varlen, flash_attn"
    ):
        hidrop.compile(tiny_llava("llama"), PRUNED, attention="flash")


def test_packed_attention_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cuda = torch.device("cuda")
    with pytest.raises(UnsupportedModelError, match="pip install flash-attn"):
        packed_attention.check_attention("flash_attn", cuda, torch.bfloat16)
    packed_attention.check_attention("varlen", cuda, torch.bfloat16)


@on_cuda
@pytest.mark.parametrize("attention", ["varlen", "flash_attn"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_packed_kernels_on_cuda_equal_the_reference(attention: str, backend: str) -> None:
    if attention == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    models = [tiny_llava("qwen2").to("cuda", torch.bfloat16) for _ in range(2)]
    for model, kernel in zip(models, ("sdpa", attention), strict=True):
        hidrop.compile(model, PRUNED, backend=backend, attention=kernel)
    inputs = batch(models[0], ROWS)
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in models)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0.1, atol=0.1)
