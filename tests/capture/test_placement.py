"""Where a decoder computes: told by its weights, and by accelerate's hooks where these are elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx.capture.placement import home, loaded, offloads, placement_of, shown_on
from tests.support.dispatched import TAIL_ON_DISK, dispatched
from tests.support.models import tiny_llava

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

CPU = torch.device("cpu")


def tail_on_disk(directory: Path) -> Any:
    return dispatched(tiny_llava(), TAIL_ON_DISK, offload_dir=str(directory)).get_decoder()


def tensors(decoder: nn.Module) -> dict[str, int]:
    return {n: id(t) for n, t in (*decoder.named_parameters(), *decoder.named_buffers())}


def test_a_decoder_on_one_device_has_no_placement() -> None:
    assert placement_of(tiny_llava().get_decoder()) is None
    whole = accelerate.dispatch_model(tiny_llava(), {"": "cpu"}, force_hooks=True)
    assert placement_of(whole.get_decoder()) is None


@pytest.mark.parametrize("whole_layers", [False, True])
def test_offloaded_weights_are_where_they_are_loaded_to(whole_layers: bool) -> None:
    kinds = ["LlamaDecoderLayer"] if whole_layers else None
    model = accelerate.cpu_offload(
        tiny_llava(), execution_device="cpu", preload_module_classes=kinds
    )
    found = placement_of(model.get_decoder())
    assert found is not None
    assert (found.entry, found.layers, found.norm) == (CPU, (CPU,) * 4, CPU)
    assert found.offloaded
    assert not found.spread
    assert home(model.get_decoder()) == CPU


def test_a_trace_is_shown_everything_on_one_device(tmp_path: Path) -> None:
    decoder = tail_on_disk(tmp_path)
    before, layer = tensors(decoder), decoder.layers[3].mlp.up_proj
    shape, dtype = layer.weight.shape, layer.weight.dtype
    with shown_on(CPU, decoder):
        assert {t.device for t in decoder.parameters()} == {CPU}
        assert (layer.weight.shape, layer.weight.dtype) == (shape, dtype)
        assert "forward" not in layer.__dict__, "accelerate's is no part of a graph"
    assert tensors(decoder) == before
    assert offloads(layer)
    assert "forward" in layer.__dict__


def test_weights_are_there_while_they_are_asked_for(tmp_path: Path) -> None:
    decoder, plain = tail_on_disk(tmp_path), tiny_llava().get_decoder()
    with loaded(decoder.layers[2]):
        for name, parameter in decoder.layers[2].named_parameters():
            assert torch.equal(parameter, plain.layers[2].get_parameter(name))
        assert all(p.is_meta for p in decoder.layers[3].parameters())
    assert all(p.is_meta for p in decoder.layers[2].parameters())


def test_a_hook_around_the_layers_loads_none_of_them(tmp_path: Path) -> None:
    """It would be called with the decoder, which a compiled model does not call."""
    model = accelerate.cpu_offload(
        tiny_llava(), execution_device=CPU, preload_module_classes=["LlamaModel"]
    )
    with pytest.raises(hidrop.UnsupportedModelError, match="has no values"):
        placement_of(model.get_decoder())
