"""Figures of `gpu.py`: prefill, decode and training steps against compiled HF with its own graphs; memory a row."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import geometries
import measure
import torch
from decode import Contestant, StaticContestant
from transformers import StaticCache

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache

SIZES = tuple(geometries.SIZES)
SHAPE = {"vision_tokens": 576, "text_tokens": 64}
# LLaVA-1.5's two stages: a caption; a dialogue of the mean length of its 665 thousand.
STAGES = {"stage1": 32, "stage2": 285}
TRAINING_ROWS = 4
DECODED = 32

Run = Callable[[argparse.Namespace], dict[str, Any]]


def prefill_of(batch: int) -> Run:
    """Return the figure of one prefill of so many rows: embedded prompt to the first token's logits."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        models = _models(options)
        inputs = geometries.prompt(models["hf"], batch=batch, **SHAPE)
        forwards = _compiled(models, options)
        calls = {
            name: partial(_first_logits, forward, inputs, cached=name != "hf")
            for name, forward in forwards.items()
        }
        plan = _plan(models["hf"], options, batch)
        return _result(calls, options, plan, "prefill_seconds")

    return run


def decode_of(batch: int) -> Run:
    """Return the figure of one decode step behind a prompt, so many rows."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        models = _models(options)
        inputs = geometries.prompt(models["hf"], batch=batch, **SHAPE)
        forwards = _compiled(models, options)
        room = DECODED * measure.CALLS_A_TURN * (options.rounds + 2) + 8
        capacity = inputs["input_ids"].shape[1] + room
        static = StaticCache(config=models["hf"].config.get_text_config(), max_cache_len=capacity)
        _first_logits(models["hf"].forward, inputs, cache=static)
        contestants: dict[str, Contestant] = {
            "hf": StaticContestant(forwards["hf"], inputs, static, capacity)
        }
        for name in ("hidrop_fx", "hidrop_fx_graphs"):
            cache = HidropCache(max_length=capacity)
            _first_logits(forwards[name], inputs, cache=cache)
            contestants[name] = Contestant(forwards[name], inputs, cache)
        calls = {name: partial(one.decode, DECODED) for name, one in contestants.items()}
        plan = _plan(models["hf"], options, batch)
        return _result(calls, options, plan, "decode_seconds", steps=DECODED)

    return run


def training_of(stage: str) -> Run:
    """Return the figure of one training step, forward and backward, all weights trained."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        models = {name: model.train() for name, model in _models(options).items()}
        shape = {**SHAPE, "text_tokens": STAGES[stage]}
        inputs = geometries.prompt(models["hf"], batch=TRAINING_ROWS, **shape)
        labels = inputs["input_ids"].clone()
        labels[:, : -STAGES[stage] // 2] = -100
        forwards = _compiled(models, options)
        calls = {
            name: partial(_step, models[name], forward, {**inputs, "labels": labels})
            for name, forward in forwards.items()
        }
        plan = hidrop.plan(options.schedule, models["hf"], **shape, batch_size=TRAINING_ROWS)
        return _result(calls, options, plan, None)

    return run


def capacity(options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory that a row of a prefill with its cache takes, and how many rows would fit by it."""
    if options.device == "cpu":
        return {"left out": "needs the allocator of CUDA"}
    models = _models(options)
    hidrop.compile(models["hidrop_fx"], options.schedule, backend=options.compiler)
    found: dict[str, Any] = {}
    for name, forward in (
        ("hf", models["hf"].forward),
        ("hidrop_fx", models["hidrop_fx"].forward),
    ):
        peaks = {}
        for rows in (2, 8):
            inputs = geometries.prompt(models["hf"], batch=rows, **SHAPE)
            _first_logits(forward, inputs)
            torch.cuda.reset_peak_memory_stats()
            kept = _first_logits(forward, inputs)
            peaks[rows] = torch.cuda.max_memory_allocated()
            del kept
        row = (peaks[8] - peaks[2]) / 6
        if not row > 0:
            return {"left out": "the allocator of this device counts nothing"}
        free = torch.cuda.get_device_properties(0).total_memory - (peaks[2] - 2 * row)
        found[name] = {"bytes_a_row": row, "rows_that_would_fit": int(free // row)}
    return found


def _models(options: argparse.Namespace) -> dict[str, Any]:
    """Build one model, and return three objects over its weights."""
    torch.manual_seed(0)
    model = geometries.named(options.size, options.device)
    return {
        "hf": model,
        "hidrop_fx": geometries.twin(model),
        "hidrop_fx_graphs": geometries.twin(model),
    }


def _compiled(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    given = {"backend": options.compiler}
    hidrop.compile(models["hidrop_fx"], options.schedule, **given)
    hidrop.compile(models["hidrop_fx_graphs"], options.schedule, cuda_graphs=True, **given)
    hf = models["hf"].forward
    if options.compiler == "inductor":
        hf = torch.compile(hf, mode="default" if options.device == "cpu" else "reduce-overhead")
    return {
        "hf": hf,
        "hidrop_fx": models["hidrop_fx"].forward,
        "hidrop_fx_graphs": models["hidrop_fx_graphs"].forward,
    }


def _plan(model: Any, options: argparse.Namespace, batch: int) -> hidrop.Costs:
    return hidrop.plan(options.schedule, model, **SHAPE, batch_size=batch)


def _result(
    calls: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
    plan: hidrop.Costs,
    bound: str | None,
    steps: int = 1,
) -> dict[str, Any]:
    """Time the calls in turns; the first call of each compiles, the second records."""
    first = {}
    for name, call in calls.items():
        first[name] = measure.seconds(call, options.device)
        call()
    times = measure.interleaved(calls, rounds=options.rounds, device=options.device)
    best = min(("hidrop_fx", "hidrop_fx_graphs"), key=lambda name: times[name]["median_s"])
    found: dict[str, Any] = {
        "milliseconds": {n: t["median_s"] / steps * 1e3 for n, t in times.items()},
        "seconds": times,
        "first_call_s": first,
        "ratio": measure.ratio(times, "hf", best),
        "token_layer_ratio": plan.token_layer_ratio,
        **measure.peak_memory(options.device),
    }
    device = next((d for d in ("h100", "h200") if d in _device_name(options).lower()), None)
    if device is not None and bound is not None:
        found["roofline_ms"] = getattr(plan.on(device), bound) * 1e3
        found["share_of_roofline"] = found["roofline_ms"] / found["milliseconds"][best]
    return found


def _device_name(options: argparse.Namespace) -> str:
    return "" if options.device == "cpu" else torch.cuda.get_device_name()


@torch.no_grad()
def _first_logits(
    forward: Callable[..., Any], inputs: dict[str, Any], *, cache: Any = None, cached: bool = True
) -> Any:
    # forward takes its images out of the mapping that it is given.
    given = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    return forward(**given, past_key_values=cache, logits_to_keep=1, use_cache=cached)


def _step(model: Any, forward: Callable[..., Any], inputs: dict[str, Any]) -> None:
    given = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    forward(**given, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
