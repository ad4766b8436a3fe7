"""Prefill: time from embedded prompt to the first token's logits.

    python benchmarks/prefill.py --size 16x2048
    python benchmarks/prefill.py --size 16x2048 --family qwen2_5_vl

HF eager, HF compiled, a plain eager loop of the schedule, and hidrop_fx, in one process, taking
turns. The limit is the number of token-layers that HF computes over the number that the schedule
leaves; `limit_reached` is the measured speed-up over compiled HF as a share of it. `kernels` are the
schedule's matrix products and attentions alone: what no compiler that calls them gets below.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from typing import Any

# Without it compiled HF breaks into four graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import eager_loop
import families
import geometries
import kernels
import measure
import torch

import hidrop_fx as hidrop


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    family = options.family
    if options.size == geometries.SHIPPED:
        model: Any = geometries.named(options.size, options.device)
    else:
        size = geometries.SIZES[options.size]
        if options.dtype:
            size = replace(size, dtype=getattr(torch, options.dtype))
        build = geometries.build if family == "llava" else partial(families.build, family)
        model = build(size, options.device)
    layers = model.config.get_text_config().num_hidden_layers
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    if family == "llava":
        inputs: dict[str, Any] = geometries.prompt(model, batch=options.batch, **shape)
    else:
        inputs = families.prompt(family, model, batch=options.batch, **shape)
    schedule = hidrop.Schedule.parse(options.schedule, num_layers=layers)
    plan = hidrop.plan(schedule, model, **shape)

    hf_model = geometries.twin(model)
    hf_compiled: list[Any] = []

    def prepare_hf() -> Any:
        hf_compiled[:] = [torch.compile(hf_model.forward)]
        return calls["hf_compiled"]

    def prepare_ours() -> Any:
        hidrop.compile(model, schedule, lowering=options.lowering)
        return calls["hidrop_fx"]

    calls = {
        "hf_eager": lambda: forward(hf_model.forward, inputs, use_cache=True),
        # Without a cache, so that it has less to do than the others.
        "hf_compiled": lambda: forward(hf_compiled[0], inputs, use_cache=False),
        "hidrop_fx": lambda: forward(model.forward, inputs, use_cache=True),
    }
    calls["kernels"] = kernels.layers(hf_model, plan.tokens, batch=options.batch)
    if options.batch == 1 and family == "llava" and eager_loop.follows(schedule):
        calls["eager_loop"] = lambda: eager_loop.prefill(hf_model, schedule, inputs)
    compile_s = measure.first_calls(prepare_ours, options.device)
    hf_compile_s = measure.first_calls(prepare_hf, options.device)
    # The reset before HF's compilation dropped ours; both are in memory for the timing.
    prepare_ours()()
    times = measure.interleaved(calls, rounds=options.rounds, device=options.device)

    speedup = measure.ratio(times, "hf_compiled", "hidrop_fx")
    result: dict[str, Any] = {
        "size": options.size,
        "family": family,
        "batch": options.batch,
        **shape,
        "dtype": str(model.dtype),
        "schedule": str(schedule),
        "environment": measure.environment(options.device),
        "seconds": times,
        "compile": compile_s,
        "compile_hf": hf_compile_s,
        "cold_share_of_hf": compile_s["cold_s"] / hf_compile_s["cold_s"],
        "cold_share_of_hf_in_cpu_time": compile_s["cold_cpu_s"] / hf_compile_s["cold_cpu_s"],
        "token_layer_limit": plan.token_layer_ratio,
        "flops_limit": plan.identity.flops / plan.flops,
        "speedup_over_hf_compiled": speedup,
        "speedup_over_hf_eager": measure.ratio(times, "hf_eager", "hidrop_fx"),
        "limit_reached": speedup / plan.token_layer_ratio,
        "limit_reached_in_cpu_time": measure.ratio(
            times, "hf_compiled", "hidrop_fx", "cpu_median_s"
        )
        / plan.token_layer_ratio,
        "speedup_of_kernels_alone_in_cpu_time": measure.ratio(
            times, "hf_compiled", "kernels", "cpu_median_s"
        ),
        "speedup_of_kernels_alone": measure.ratio(times, "hf_compiled", "kernels"),
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_identity": plan.identity.kv_bytes,
        **measure.peak_memory(options.device),
    }
    for name, taken in times.items():
        print(f"{name:12} {taken['median_s']:8.4f} s")
    print(f"speed-up over compiled HF {speedup:.3f}, limit {plan.token_layer_ratio:.3f}")
    print(f"cold compile {compile_s['cold_s']:.1f} s, compiled HF {hf_compile_s['cold_s']:.1f} s")
    measure.write(
        f"prefill-{'' if family == 'llava' else family + '-'}{options.size}-b{options.batch}-{options.device}",
        result,
        options.output,
    )


@torch.no_grad()
def forward(call: Any, inputs: dict[str, Any], *, use_cache: bool) -> Any:
    """Return the logits [B, 1, vocabulary] of a prompt; ready features are handed over anew, since HF takes them out."""
    ready = inputs.get("mm_encoder_outputs")
    given = inputs if ready is None else {**inputs, "mm_encoder_outputs": dict(ready)}
    return call(**given, logits_to_keep=1, use_cache=use_cache).logits


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="16x2048", choices=[*geometries.SIZES, geometries.SHIPPED]
    )
    parser.add_argument(
        "--family",
        default="llava",
        choices=("llava", *families.CONFIGS),
        help="all but llava at a size of SIZES, not the shipped one",
    )
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vision-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default=None, choices=("bodies", "whole"))
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.family != "llava" and options.size == geometries.SHIPPED:
        parser.error("--family needs a size: the shipped model is a LLaVA")
    if options.dtype and options.size == geometries.SHIPPED:
        parser.error("--dtype needs a size: the shipped model is in float32")
    return options


if __name__ == "__main__":
    main()
