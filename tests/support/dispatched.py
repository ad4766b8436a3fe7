"""Tiny models that accelerate spreads over devices, or whose weights it loads for each call.

model = dispatched(tiny_llava(), BALANCED)          # on cuda:0 and cuda:1, real or simulated ones
model = dispatched(tiny_llava(), TAIL_ON_DISK, offload_dir=tmp_path)
"""

from __future__ import annotations

from typing import Any

import pytest

Map = dict[str, Any]


def device_map(layers: list[Any], *, norm: Any, embedding: Any, **others: Any) -> Map:
    """Name the device of each layer of the text decoder, of its norm and embedding, and of what is outside."""
    decoder = "model.language_model"
    outside = {"vision_tower": embedding, "multi_modal_projector": embedding, "head": norm} | others
    return {
        "model.vision_tower": outside["vision_tower"],
        "model.multi_modal_projector": outside["multi_modal_projector"],
        f"{decoder}.embed_tokens": embedding,
        f"{decoder}.rotary_emb": embedding,
        **{f"{decoder}.layers.{k}": device for k, device in enumerate(layers)},
        f"{decoder}.norm": norm,
        "lm_head": outside["head"],
    }


BALANCED = device_map([0, 0, 1, 1], norm=1, embedding=0)
"""As accelerate's "balanced": the first half on one device."""
TO_AND_FRO = device_map([1, 0, 1, 0], norm=1, embedding=0, head=0, vision_tower=1)
"""The device changes at every layer, and between all other parts."""
BESIDE_CPU = device_map([0, 0, "cpu", 1], norm=1, embedding=0)
"""One layer's weights wait on the CPU, and are loaded to the first GPU."""
TAIL_ON_DISK = device_map(["cpu", "cpu", "disk", "disk"], norm="cpu", embedding="cpu")
ALL_ON_DISK = device_map(["disk"] * 4, norm="disk", embedding="disk")


def dispatched(model: Any, places: Map, **options: Any) -> Any:
    """Let accelerate dispatch a model, as `from_pretrained(..., device_map=...)` does, and return it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    named = {part: f"cuda:{d}" if isinstance(d, int) else d for part, d in places.items()}
    main = "cuda:0" if "cuda:0" in named.values() else None
    given = {"skip_keys": model._skip_keys_device_placement, "main_device": main}
    found = accelerate.dispatch_model(model, named, **(given | options))
    found.hf_device_map = named
    return found
