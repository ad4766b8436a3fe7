"""Time `generate`, and size its KV cache; compiled or plain, in the same way.

first token     = median time of generate(max_new_tokens=1)
decode speed    = (n - 1) / (median time of generate with exactly n tokens - first token)
KV cache        = buffers of the cache that generate(max_new_tokens=1) returns
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one prompt, warm."""

    first_token_seconds: float
    decode_tokens_per_second: float | None
    """None if it was not measured."""
    kv_bytes: int
    """Buffers of the KV cache after the prompt."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)


def measure(
    model: Any, inputs: Mapping[str, Any], *, new_tokens: int | None = 32, repeats: int = 5
) -> Measurement:
    """Time `generate` on one batch of inputs.

    Args:
        model: compiled or not.
        inputs: what `model.generate` takes.
        new_tokens: length of the answer that decode speed is measured on; None measures none.
        repeats: runs of which the median counts; one more, not counted, comes before them.
    """
    warm_up(model, inputs, new_tokens)
    first = _median_seconds(model, inputs, 1, repeats)
    speed = None
    if new_tokens is not None:
        whole = _median_seconds(model, inputs, new_tokens, max(1, repeats // 2))
        speed = (new_tokens - 1) / max(whole - first, 1e-9)
    return Measurement(
        first_token_seconds=first,
        decode_tokens_per_second=speed,
        kv_bytes=kv_bytes(_generate(model, inputs, 1).past_key_values),
    )


def warm_up(model: Any, inputs: Mapping[str, Any], new_tokens: int | None = 3) -> None:
    """Run everything that `measure` runs once, so that it is compiled."""
    _generate(model, inputs, 1)
    if new_tokens is not None:
        _generate(model, inputs, new_tokens)


def kv_bytes(cache: Any) -> int:
    """Sum the bytes of a cache's keys and values; transformers' caches and this package's."""
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)


def _median_seconds(model: Any, inputs: Mapping[str, Any], tokens: int, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        _synchronize(model)
        started = time.perf_counter()
        _generate(model, inputs, tokens)
        _synchronize(model)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _generate(model: Any, inputs: Mapping[str, Any], tokens: int) -> Any:
    return model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
    )


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
