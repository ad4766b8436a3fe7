"""Prefill under every preset: its share of its own token-layer limit, in one table.

    python benchmarks/presets.py --size 16x2048

One twin of a model for each preset, over the same weights, and compiled HF beside them, in one process, taking
turns. The limit is the number of token-layers that HF computes over the number that the preset leaves. Published
layers are for 32 layers; for fewer they are scaled down, and the table says to what.
"""

import argparse
import os
from typing import Any

# Without it compiled HF breaks into four graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import geometries
import measure
import torch
from prefill import forward

import hidrop_fx as hidrop

PUBLISHED_DEPTH = 32
PIXELS = ("visionzip", "duet")
"""Methods that look into the tower, which has to run; the others are given ready features."""


def presets(depth: int) -> dict[str, str]:
    """Return the schedule of each preset, its layers scaled from 32 to `depth`."""

    def at(*layers: int) -> str:
        found = tuple(max(1, layer * depth // PUBLISHED_DEPTH) for layer in layers)
        return str(found[0]) if len(found) == 1 else str(found)

    return {
        "identity": "identity",
        "hidrop": "hidrop-64",
        "fastv": f"fastv(layer={at(2)})",
        "pyramiddrop": f"pyramiddrop(layers={at(8, 16, 24)})",
        "vtw": f"vtw(layer={at(15)})",
        "v2drop": f"v2drop(layers={at(3, 17, 22)})",
        "random": f"random(layers=({at(2)},),keeps=(0.5,))",
        "sparsevlm": f"sparsevlm(layers={at(3, 7, 16)})",
        "divprune": "divprune",
        "cdpruner": "cdpruner",
        "pooling": "pooling",
        "visionzip": "visionzip",
        "duet": f"duet(layer={at(16)},exit={at(24)})",
        "twigvlm": f"twigvlm(layer={at(2)},average=192,exit={at(24)})",
        "ivc-prune": f"ivc-prune(layer={at(16)})",
        "vica": f"vica(layers={(0, *dict.fromkeys(max(1, k * depth // PUBLISHED_DEPTH) for k in (2, 7, 9, 10, 14)))})",
        "snapkv": "snapkv",
        "pyramidkv": "pyramidkv",
        "mixkv": "mixkv",
    }


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    model: Any = geometries.named(options.size)
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    ready = geometries.prompt(model, batch=options.batch, **shape)
    pixels = {name: value for name, value in ready.items() if name != "mm_encoder_outputs"}
    images = (options.batch, 3, geometries.IMAGE_SIZE, geometries.IMAGE_SIZE)
    pixels["pixel_values"] = torch.randn(images, dtype=model.dtype)

    depth = model.config.text_config.num_hidden_layers
    chosen = {n: t for n, t in presets(depth).items() if not options.only or n in options.only}
    compiled = torch.compile(geometries.twin(model).forward)
    calls = {
        # Without a cache, so that it has less to do than the others.
        "hf_compiled": lambda: forward(compiled, ready, use_cache=False),
        "hf_compiled_pixels": lambda: forward(compiled, pixels, use_cache=False),
    }
    plans = {}
    for name, text in chosen.items():
        schedule = hidrop.Schedule.parse(text, num_layers=depth)
        plans[name] = hidrop.plan(schedule, model, **shape)
        twin = geometries.twin(model)
        # The limit in token-layers leaves the side branch out, that in FLOPs does not.
        grown = {n: hidrop.grow_twig(twin, layer=min(schedule.prune)) for n in schedule.modules}
        hidrop.compile(twin, schedule, modules=grown)
        inputs = pixels if name in PIXELS else ready
        calls[name] = lambda twin=twin, inputs=inputs: forward(twin.forward, inputs, use_cache=True)
    for call in calls.values():
        call()
    times = measure.interleaved(calls, rounds=options.rounds)

    rows = {}
    for name, plan in plans.items():
        baseline = "hf_compiled_pixels" if name in PIXELS else "hf_compiled"
        speedup = measure.ratio(times, baseline, name)
        rows[name] = {
            "schedule": chosen[name],
            "token_layer_limit": plan.token_layer_ratio,
            "flops_limit": plan.identity.flops / plan.flops,
            "speedup_over_hf_compiled": speedup,
            "limit_reached": speedup / plan.token_layer_ratio,
            "flops_limit_reached": speedup / (plan.identity.flops / plan.flops),
            **times[name],
        }
        print(
            f"{name:12} {times[name]['median_s']:7.3f} s  {speedup:6.3f}x, limit {plan.token_layer_ratio:6.3f}: "
            f"{rows[name]['limit_reached']:.3f}  {chosen[name]}"
        )
    result = {
        "size": options.size,
        "batch": options.batch,
        **shape,
        "dtype": str(model.dtype),
        "environment": measure.environment(),
        "hf_compiled": times["hf_compiled"],
        "hf_compiled_pixels": times["hf_compiled_pixels"],
        "presets": rows,
        **measure.peak_memory(),
    }
    measure.write(f"presets-{options.size}-b{options.batch}-cpu", result, options.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="16x2048", choices=list(geometries.SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vision-tokens", type=int, default=geometries.VISION_TOKENS)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=(), help="presets, by name")
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
