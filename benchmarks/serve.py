"""Serving: requests of mixed lengths in a closed loop, in static batches in order of arrival.

    python benchmarks/serve.py --size 16x2048 --batch 4 --requests 16

A batch starts as soon as the one before has ended, which is when its requests count as arrived; it
runs as long as its longest answer, and a shorter one is done with its own last token. HF eager
(dynamic cache), HF with a static cache (its decode compiled by `generate`), hidrop_fx, and hidrop_fx
with recorded graphs go through `generate` in one process, taking turns, on the same batches. The
vision tower is as small as can be: a real one adds the same time to all of them.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import geometries
import measure
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of

# What a request is drawn from: most have one image.
IMAGES = (0, 1, 1, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and the length of its answer."""

    text: int
    images: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that are served together."""

    requests: Sequence[Request]
    inputs: dict[str, Tensor]

    @property
    def new_tokens(self) -> int:
        return max(request.new_tokens for request in self.requests)

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1] + self.new_tokens


@dataclass(kw_only=True)
class Served:
    """Counts and times of one contestant so far."""

    wall_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    """One a request, from its arrival."""
    latency_s: list[float] = field(default_factory=list)
    new_tokens: int = 0
    """That were asked for; a row that waits for the rest of its batch makes none."""

    def summary(self) -> dict[str, Any]:
        return {
            "requests_a_second": len(self.latency_s) / self.wall_s,
            "tokens_a_second": self.new_tokens / self.wall_s,
            "first_token_s": measure.percentiles(self.first_token_s),
            "latency_s": measure.percentiles(self.latency_s),
            "requests": len(self.latency_s),
            "wall_s": self.wall_s,
        }


class Clock(BaseStreamer):
    """When each token of a batch reached the host; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


Generate = Callable[..., Any]


def serve(generate: Generate, batches: Sequence[Batch], served: Served, device: str) -> None:
    """Serve all batches, one after another."""
    for batch in batches:
        clock = Clock()
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        generate(
            **batch.inputs,
            max_new_tokens=batch.new_tokens,
            eos_token_id=None,
            do_sample=False,
            streamer=clock,
        )
        served.wall_s += time.perf_counter() - started
        for request in batch.requests:
            served.first_token_s.append(clock.times[1] - started)
            served.latency_s.append(clock.times[request.new_tokens] - started)
            served.new_tokens += request.new_tokens


def main() -> None:
    options = _parse()
    size = geometries.SIZES[options.size]
    torch.manual_seed(0)
    model = geometries.build(size, options.device)
    hf_model = geometries.twin(model)
    graphed = geometries.twin(model)
    schedule = hidrop.Schedule.parse(options.schedule, num_layers=size.layers)
    batches = _batches(model, options)

    contestants: dict[str, Generate] = {
        "hf_eager": hf_model.generate,
        "hf_compiled": _static_generate(hf_model, batches, options.device),
        "hidrop_fx": model.generate,
        "hidrop_fx_graphs": graphed.generate,
    }
    hidrop.compile(model, schedule)
    hidrop.compile(graphed, schedule, cuda_graphs=True, bucket_multiple=options.bucket_multiple)
    ours = {"hidrop_fx": model, "hidrop_fx_graphs": graphed}
    warm_up_s = {
        name: measure.seconds(
            lambda one=one: hidrop.warmup(one, _shapes(batches, options)), options.device
        )
        for name, one in ours.items()
    }
    # The second batch has another length, for which the compilers may make another variant.
    first_s = {
        name: measure.seconds(lambda one=one: serve(one, batches[:2], Served(), options.device))
        for name, one in contestants.items()
    }
    known = {name: _compilations(one) for name, one in ours.items()}
    graphs = counters["stats"]["unique_graphs"]
    served = {name: Served() for name in contestants}
    for _ in range(options.rounds):
        for name, generate in contestants.items():
            serve(generate, batches, served[name], options.device)

    summaries = {name: one.summary() for name, one in served.items()}
    result: dict[str, Any] = {
        "size": options.size,
        "batch": options.batch,
        "requests": options.requests,
        "rounds": options.rounds,
        "text_tokens": options.text,
        "answer_tokens": options.answer,
        "images_drawn_from": IMAGES,
        "vision_tokens_an_image": geometries.VISION_TOKENS,
        "dtype": str(size.dtype),
        "schedule": str(schedule),
        "environment": measure.environment(options.device),
        "served": summaries,
        "throughput_over_hf_compiled": _over(summaries, "hf_compiled"),
        "throughput_over_hf_eager": _over(summaries, "hf_eager"),
        "warm_up_s": warm_up_s,
        "first_two_batches_s": first_s,
        "compiled_while_serving": {n: _compilations(m) - known[n] for n, m in ours.items()},
        "dynamo_graphs_while_serving": counters["stats"]["unique_graphs"] - graphs,
        **measure.peak_memory(options.device),
    }
    for name, one in summaries.items():
        print(
            f"{name:17} {one['requests_a_second']:8.3f} requests/s {one['tokens_a_second']:9.2f} "
            f"tokens/s   first token {_shown(one['first_token_s'])}   all {_shown(one['latency_s'])}"
        )
    measure.write(f"serve-{options.size}-b{options.batch}-{options.device}", result, options.output)


def _batches(model: Any, options: argparse.Namespace) -> list[Batch]:
    draw = random.Random(0)
    requests = [
        Request(
            text=draw.randint(*options.text),
            images=draw.choice(IMAGES),
            new_tokens=draw.randint(*options.answer),
        )
        for _ in range(options.requests)
    ]
    found = []
    for start in range(0, len(requests), options.batch):
        chosen = requests[start : start + options.batch]
        inputs = geometries.mixed_prompts(model, [(one.text, one.images) for one in chosen])
        found.append(Batch(requests=chosen, inputs=inputs))
    return found


def _static_generate(model: Any, batches: Sequence[Batch], device: str) -> Generate:
    """Return HF's `generate` on one static cache that all batches fit in, at addresses that stay."""
    capacity = max(batch.length for batch in batches)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=capacity)
    compiling = CompileConfig()
    compiling._compile_all_devices = device == "cpu"  # it would leave a CPU out

    def generate(**inputs: Any) -> Any:
        cache.reset()
        return model.generate(**inputs, past_key_values=cache, compile_config=compiling)

    return generate


def _shapes(batches: Sequence[Batch], options: argparse.Namespace) -> list[hidrop.Shape]:
    """Return the shapes that the batches round up to: a server would name its longest prompts and answers."""

    def rounded(text: int) -> int:
        return -(-text // options.bucket_multiple) * options.bucket_multiple

    found = {
        hidrop.Shape(
            batch=len(batch.requests),
            text=rounded(max(one.text for one in batch.requests)),
            images=max(one.images for one in batch.requests),
            new_tokens=rounded(options.answer[1]),
        )
        for batch in batches
    }
    return list(found)


def _compilations(model: Any) -> int:
    runtime = runtime_of(model)
    assert runtime is not None
    return len(runtime.programs.log.entries)


def _over(summaries: dict[str, dict[str, Any]], other: str) -> dict[str, float]:
    base = summaries[other]["requests_a_second"]
    ours = ("hidrop_fx", "hidrop_fx_graphs")
    return {name: summaries[name]["requests_a_second"] / base for name in ours}


def _shown(seconds: dict[str, float]) -> str:
    return f"{seconds['p50']:.3f} / {seconds['p99']:.3f} s"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="16x2048", choices=geometries.SIZES)
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--text", type=int, nargs=2, default=(16, 128), help="tokens, from and to")
    parser.add_argument("--answer", type=int, nargs=2, default=(8, 64), help="tokens, from and to")
    parser.add_argument("--bucket-multiple", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.requests % options.batch:
        parser.error(
            f"--requests {options.requests} is no multiple of --batch {options.batch}: a static cache "
            "serves one batch size"
        )
    return options


if __name__ == "__main__":
    main()
