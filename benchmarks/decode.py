"""Decode: time per generated token, after a prompt with one image.

    python benchmarks/decode.py --size 16x2048 --batch 1

HF eager (dynamic cache), HF compiled with a static cache (what `generate` compiles on a GPU), and
hidrop_fx, in one process, taking turns; every turn decodes the same number of tokens.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

# Without it compiled HF breaks into several graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import geometries
import measure
import torch
from torch import Tensor
from transformers import StaticCache

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache


class Contestant:
    """A model with a filled cache, that decodes `tokens` tokens at a call and then forgets them."""

    def __init__(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: Any) -> None:
        self.forward = forward
        self.cache = cache
        self.length = inputs["input_ids"].shape[1]
        self.token = inputs["input_ids"][:, -1:]
        self.done = 0

    @torch.no_grad()
    def decode(self, tokens: int) -> Tensor:
        for _ in range(tokens):
            logits = self.step(self.length + self.done)
            self.done += 1
        return logits

    def step(self, position: int) -> Tensor:
        positions = torch.full_like(self.token, position)
        output = self.forward(
            input_ids=self.token,
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=1,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


class StaticContestant(Contestant):
    """HF compiled: the mask over the static cache is made outside the graph, as `generate` does."""

    def __init__(
        self, forward: Callable[..., Any], inputs: dict[str, Any], cache: Any, capacity: int
    ) -> None:
        super().__init__(forward, inputs, cache)
        self.places = torch.arange(capacity, device=self.token.device)

    def step(self, position: int) -> Tensor:
        mask = (self.places <= position).expand(len(self.token), 1, 1, -1)
        output = self.forward(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=torch.full_like(self.token, position),
            past_key_values=self.cache,
            logits_to_keep=1,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    model = geometries.named(options.size, options.device)
    layers = model.config.text_config.num_hidden_layers
    hf_model = geometries.twin(model)
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    inputs = geometries.prompt(model, batch=options.batch, **shape)
    schedule = hidrop.Schedule.parse(options.schedule, num_layers=layers)
    room = options.tokens * measure.CALLS_A_TURN * options.rounds + 8
    plan = hidrop.plan(schedule, model, **shape, batch_size=options.batch, new_tokens=room)

    contestants: dict[str, Contestant] = {}

    def prepare_ours() -> Callable[[], Any]:
        hidrop.compile(model, schedule, lowering=options.lowering)
        length = inputs["input_ids"].shape[1]
        cache = _prefill(model.forward, inputs, HidropCache(max_length=length + room))
        contestants["hidrop_fx"] = Contestant(model.forward, inputs, cache)
        return lambda: contestants["hidrop_fx"].decode(2)

    def prepare_hf() -> Callable[[], Any]:
        capacity = inputs["input_ids"].shape[1] + room
        static = StaticCache(config=hf_model.config.get_text_config(), max_cache_len=capacity)
        cache = _prefill(hf_model.forward, inputs, static)
        forward = torch.compile(hf_model.forward)
        contestants["hf_compiled"] = StaticContestant(forward, inputs, cache, capacity)
        return lambda: contestants["hf_compiled"].decode(2)

    compile_hf_s = measure.first_calls(prepare_hf, options.device)
    compile_s = measure.first_calls(prepare_ours, options.device)
    prepare_hf()()
    dynamic = _prefill(hf_model.forward, inputs, None)
    contestants["hf_eager"] = Contestant(hf_model.forward, inputs, dynamic)
    calls = {
        name: (lambda one=one: one.decode(options.tokens)) for name, one in contestants.items()
    }
    times = measure.interleaved(calls, rounds=options.rounds, device=options.device)

    result: dict[str, Any] = {
        "size": options.size,
        "batch": options.batch,
        "tokens_a_turn": options.tokens,
        **shape,
        "dtype": str(model.dtype),
        "schedule": str(schedule),
        "environment": measure.environment(options.device),
        "seconds_a_turn": times,
        "ms_a_token": {n: t["median_s"] / options.tokens * 1e3 for n, t in times.items()},
        "speedup_over_hf_compiled": measure.ratio(times, "hf_compiled", "hidrop_fx"),
        "speedup_over_hf_eager": measure.ratio(times, "hf_eager", "hidrop_fx"),
        "compile_prefill_and_decode": compile_s,
        "compile_hf_decode": compile_hf_s,
        "kv_bytes": contestants["hidrop_fx"].cache.nbytes,
        "kv_bytes_planned": plan.kv_bytes,
        "kv_bytes_identity": plan.identity.kv_bytes,
        **measure.peak_memory(options.device),
    }
    for name, milliseconds in result["ms_a_token"].items():
        print(f"{name:12} {milliseconds:8.2f} ms a token")
    print(f"speed-up over compiled HF {result['speedup_over_hf_compiled']:.3f}")
    measure.write(
        f"decode-{options.size}-b{options.batch}-{options.device}", result, options.output
    )


@torch.no_grad()
def _prefill(forward: Callable[..., Any], inputs: dict[str, Any], cache: Any) -> Any:
    given = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    output = forward(**given, past_key_values=cache, logits_to_keep=1, use_cache=True)
    return output.past_key_values


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="16x2048", choices=[*geometries.SIZES, geometries.SHIPPED]
    )
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vision-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="decoded a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default=None, choices=("bodies", "whole"))
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
