"""The snapshot of a decoder notices what a captured graph depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hidrop_fx.runtime.fingerprint import DecoderSnapshot
from tests.support.models import tiny_llava


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.train(),
        lambda d: d.layers[1].double(),
        lambda d: setattr(d.layers[0].self_attn, "scaling", 0.5),
        lambda d: setattr(d.layers[0].self_attn, "note", torch.zeros(2)),
        lambda d: setattr(d.norm, "weight", nn.Parameter(torch.ones(32))),
        lambda d: d.layers[0].register_buffer("extra", torch.ones(1)),
        lambda d: d.layers[0].register_forward_hook(lambda *_: None),
        lambda d: d.layers[0].mlp.add_module("act_fn", nn.ReLU()),
        lambda d: d.layers.append(nn.Linear(1, 1)),
    ],
)
def test_decoder_snapshot_notices_every_change(change: Callable[[Any], Any]) -> None:
    decoder = tiny_llava("llama").get_decoder()
    decoder.layers[0].self_attn.note = torch.ones(2)
    watch = DecoderSnapshot(decoder)
    assert watch.unchanged(decoder)
    assert not watch.unchanged(copy.deepcopy(decoder))
    change(decoder)
    assert not watch.unchanged(decoder)
