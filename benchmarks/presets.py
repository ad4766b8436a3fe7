"""Prefill under every preset: its share of its own token-layer limit, in one table.

    python benchmarks/presets.py --size 16x2048

One twin of a model for each preset, over the same weights, and compiled HF beside them, in one process, taking
turns. The limit is the number of token-layers that HF computes over the number that the preset leaves. Published
layers are for 32 layers; for fewer they are scaled down, and the table says to what.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

# Without it compiled HF breaks into four graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import families
import geometries
import kernels
import measure
import torch
from prefill import forward

import hidrop_fx as hidrop

PUBLISHED_DEPTH = 32

PIXELS = ("visionzip", "duet")
"""Methods that look into the tower, which has to run; the others are given ready features."""

FAMILY = {"ppe": "qwen2_5_vl"}
"""Methods for position ids of several axes, beside compiled HF of their own class."""

VOCO_TOKEN, VOCO_TOKENS = geometries.IMAGE_TOKEN + 1, 2


def presets(depth: int) -> dict[str, str]:
    """Return the schedule of each preset, its layers scaled from 32 to `depth`."""

    def at(*layers: int) -> str:
        found = tuple(max(1, layer * depth // PUBLISHED_DEPTH) for layer in layers)
        return str(found[0]) if len(found) == 1 else str(found)

    reads = (
        0,
        *dict.fromkeys(max(1, layer * depth // PUBLISHED_DEPTH) for layer in (2, 7, 9, 10, 14)),
    )
    return {
        "identity": "identity",
        "hidrop": "hidrop-64",
        "fastv": f"fastv(layer={at(2)})",
        "pyramiddrop": f"pyramiddrop(layers={at(8, 16, 24)})",
        "vtw": f"vtw(layer={at(15)})",
        "v2drop": f"v2drop(layers={at(3, 17, 22)})",
        "random": f"random(layers=({at(2)},),keeps=(0.5,))",
        "sparsevlm": f"sparsevlm(layers={at(3, 7, 16)})",
        "twigvlm": f"twigvlm(layer={at(2)},exit={at(24)})",
        "divprune": "divprune",
        "cdpruner": "cdpruner",
        "pooling": "pooling",
        "visionzip": "visionzip",
        "duet": f"duet(layer={at(16)},exit={at(24)})",
        "ppe": "ppe",
        "ivc-prune": f"ivc-prune(layer={at(16)})",
        "vica": f"vica(layers={reads})",
        "voco": f"voco(token_id={VOCO_TOKEN})",
        "snapkv": "snapkv",
        "pyramidkv": "pyramidkv",
        "mixkv": "mixkv",
    }  # fmt: skip


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    size = geometries.SIZES[options.size]
    if options.dtype:
        size = replace(size, dtype=getattr(torch, options.dtype))
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    known = presets(size.layers)
    chosen = {name: known[name] for name in options.only or known}
    models: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}
    baselines, plans = {}, {}
    for name, text in chosen.items():
        family = FAMILY.get(name, "llava")
        if family not in models:
            models[family] = _built(family, size)
        model = models[family]
        inputs = _inputs(name, model, options.batch, shape)
        baselines[name] = f"hf_compiled, {family}{', pixels' if name in PIXELS else ''}"
        if baselines[name] not in calls:
            compiled = torch.compile(geometries.twin(model).forward)
            # Without a cache, so that it has less to do than the others.
            calls[baselines[name]] = partial(forward, compiled, inputs, use_cache=False)
        schedule = hidrop.Schedule.parse(text, num_layers=size.layers)
        plans[name] = hidrop.plan(schedule, model, **shape)
        twin = geometries.twin(model)
        modules = None
        if name == "twigvlm":
            modules = {"twig": hidrop.grow_twig(twin, layer=next(iter(schedule.prune)))}
        hidrop.compile(twin, schedule, modules=modules)
        calls[name] = partial(forward, twin.forward, inputs, use_cache=True)
        if options.kernels:
            alone = kernels.layers(model, plans[name].tokens, batch=options.batch)
            calls[f"kernels, {name}"] = alone
    for name, call in calls.items():
        begun = time.perf_counter()
        call()
        print(f"{name:12} compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    times = measure.interleaved(calls, rounds=options.rounds)

    rows = {}
    for name, plan in plans.items():
        speedup = measure.ratio(times, baselines[name], name)
        rows[name] = {
            "schedule": chosen[name],
            "beside": baselines[name],
            "token_layer_limit": plan.token_layer_ratio,
            "flops_limit": plan.identity.flops / plan.flops,
            "speedup_over_hf_compiled": speedup,
            "limit_reached": speedup / plan.token_layer_ratio,
            "flops_limit_reached": speedup * plan.flops / plan.identity.flops,
            **times[name],
        }
        if options.kernels:
            alone = measure.ratio(times, baselines[name], f"kernels, {name}")
            rows[name]["limit_reached_by_kernels_alone"] = alone / plan.token_layer_ratio
            rows[name]["kernels"] = times[f"kernels, {name}"]
        print(
            f"{name:12} {times[name]['median_s']:7.3f} s  {speedup:6.3f}x, limit {plan.token_layer_ratio:6.3f}: "
            f"{rows[name]['limit_reached']:.3f}  {chosen[name]}"
        )
    result = {
        "size": options.size,
        "batch": options.batch,
        **shape,
        "dtype": str(size.dtype),
        "environment": measure.environment(),
        **{name: times[name] for name in dict.fromkeys(baselines.values())},
        "presets": rows,
        **measure.peak_memory(),
    }
    measure.write(f"presets-{options.size}-b{options.batch}-cpu", result, options.output)


def _built(family: str, size: geometries.Size) -> Any:
    return geometries.build(size) if family == "llava" else families.build(family, size)


def _inputs(name: str, model: Any, batch: int, shape: dict[str, int]) -> dict[str, Any]:
    """Make a prompt as a method takes it: with ready features, or with pixels; for VoCo with its tokens."""
    if name in FAMILY:
        return families.prompt(FAMILY[name], model, batch=batch, **shape)
    inputs: dict[str, Any] = geometries.prompt(model, batch=batch, **shape)
    if name in PIXELS:
        del inputs["mm_encoder_outputs"]
        images = (batch, 3, geometries.IMAGE_SIZE, geometries.IMAGE_SIZE)
        inputs["pixel_values"] = torch.randn(images, dtype=model.dtype)
    if name == "voco":
        behind = shape["text_tokens"] // 4 + shape["vision_tokens"]
        inputs["input_ids"][:, behind : behind + VOCO_TOKENS] = VOCO_TOKEN
    return inputs


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="16x2048", choices=list(geometries.SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vision-tokens", type=int, default=geometries.VISION_TOKENS)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="for a CPU that only emulates bfloat16; the size's own if left out",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=(), help="presets, by name")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="time each preset's matrix products and attentions alone, too",
    )
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
