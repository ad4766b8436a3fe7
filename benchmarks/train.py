"""Training step: forward and backward of a batch, without the optimizer's part, which all share.

    python benchmarks/train.py --size 32x512 --batch 4 --text-tokens 128

HF eager, HF compiled, a plain eager loop of the schedule, and hidrop_fx, in one process, taking
turns. `limit_reached` is the speed-up over compiled HF as a share of the token-layer ratio; it may
exceed one, since attention shrinks with the square.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

# Without it compiled HF breaks into several graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import eager_loop
import geometries
import measure
import torch

import hidrop_fx as hidrop

IGNORE = -100


def main() -> None:
    options = _parse()
    size = geometries.SIZES[options.size]
    torch.manual_seed(0)
    model = geometries.build(size, options.device).train()
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    inputs = geometries.prompt(model, batch=options.batch, **shape)
    inputs["labels"] = _labels(inputs["input_ids"], options.text_tokens // 4)
    schedule = hidrop.Schedule.parse(options.schedule, num_layers=size.layers)
    plan = hidrop.plan(schedule, model, **shape)

    hf_model = geometries.twin(model)
    hf_compiled: list[Any] = []

    def prepare_hf() -> Callable[[], Any]:
        hf_compiled[:] = [torch.compile(hf_model.forward)]
        return calls["hf_compiled"]

    def prepare_ours() -> Callable[[], Any]:
        hidrop.compile(model, schedule, lowering=options.lowering)
        return calls["hidrop_fx"]

    losses: dict[str, Callable[[], torch.Tensor]] = {
        "hf_eager": lambda: _loss(hf_model.forward, inputs),
        "hf_compiled": lambda: _loss(hf_compiled[0], inputs),
        "hidrop_fx": lambda: _loss(model.forward, inputs),
    }
    if eager_loop.follows(schedule):
        losses["eager_loop"] = lambda: eager_loop.loss(hf_model, schedule, inputs)
    calls = {name: partial(_step, model, loss) for name, loss in losses.items()}
    compile_s = measure.first_calls(prepare_ours, options.device)
    hf_compile_s = measure.first_calls(prepare_hf, options.device)
    # The reset before HF's compilation dropped ours; both are in memory for the timing.
    prepare_ours()()
    times = measure.interleaved(calls, rounds=options.rounds, device=options.device)

    speedup = measure.ratio(times, "hf_compiled", "hidrop_fx")
    result: dict[str, Any] = {
        "size": options.size,
        "batch": options.batch,
        **shape,
        "dtype": str(size.dtype),
        "schedule": str(schedule),
        "environment": measure.environment(options.device),
        "seconds": times,
        "compile": compile_s,
        "compile_hf": hf_compile_s,
        "cold_share_of_hf": compile_s["cold_s"] / hf_compile_s["cold_s"],
        "token_layer_limit": plan.token_layer_ratio,
        "flops_limit": plan.identity.flops / plan.flops,
        "speedup_over_hf_compiled": speedup,
        "speedup_over_hf_eager": measure.ratio(times, "hf_eager", "hidrop_fx"),
        "limit_reached": speedup / plan.token_layer_ratio,
        "activation_bytes": {name: measure.saved_bytes(call) for name, call in losses.items()},
        **measure.peak_memory(options.device),
    }
    if "eager_loop" in losses:
        result["speedup_over_eager_loop"] = measure.ratio(times, "eager_loop", "hidrop_fx")
    for name, taken in times.items():
        print(f"{name:12} {taken['median_s']:8.4f} s")
    print(f"speed-up over compiled HF {speedup:.3f}, token layers {plan.token_layer_ratio:.3f}")
    print(f"cold compile {compile_s['cold_s']:.1f} s, compiled HF {hf_compile_s['cold_s']:.1f} s")
    name = f"train-{options.size}-b{options.batch}-{options.text_tokens}-{options.device}"
    measure.write(name, result, options.output)


def _step(model: Any, loss: Callable[[], torch.Tensor]) -> None:
    loss().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def _loss(forward: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    # forward takes its images out of the mapping that it is given.
    given = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    loss: torch.Tensor = forward(**given, use_cache=False).loss
    return loss


def _labels(ids: torch.Tensor, head: int) -> torch.Tensor:
    """Label one answer: the second half of the text behind the image."""
    labels = ids.clone()
    labels[:, : -(head + head // 2)] = IGNORE
    return labels


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="32x512", choices=geometries.SIZES)
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vision-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default=None, choices=("bodies", "whole"))
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
