"""Overhead: the time of a call in hidrop_fx's own Python, beside the program, the embedding and the head.

    python benchmarks/overhead.py --size 32x64

Time of `model(...)` minus the time in the rewritten graph, the embedding and the output head: laying
the batch out, looking the program up, keeping the cache's books, copies to and from static buffers.
Calls are made as `generate` makes them, one prompt and then one token at a time; and, as `decode_alone`, as a
loop of one's own makes them, where each call looks whether the model has changed. With `--backend inductor`
the guards of compiled code count as part of the graph.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import geometries
import measure
import torch
from torch import Tensor, nn

import hidrop_fx as hidrop
from hidrop_fx.runtime.decode import TURN, Turn
from hidrop_fx.runtime.hf.binding import runtime_of

Inputs = dict[str, Any]


class Stopwatch:
    """Time spent in what it watches; one thing runs at a time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return timed

    @contextmanager
    def on_module(self, module: nn.Module) -> Iterator[None]:
        """Count the time of a module's calls."""

        def start(*_: Any) -> None:
            self._started = time.perf_counter()

        def stop(*_: Any) -> None:
            self.seconds += time.perf_counter() - self._started

        hooks = module.register_forward_pre_hook(start), module.register_forward_hook(stop)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    model = geometries.named(options.size)
    layers = model.config.text_config.num_hidden_layers
    schedule = hidrop.Schedule.parse(options.schedule, num_layers=layers)
    found: dict[str, Any] = {}
    for graphs in (False, True):
        hidrop.compile(model, schedule, backend=options.backend, cuda_graphs=graphs)
        for batch in options.batches:
            name = f"batch {batch}{', ragged' if batch > 1 else ''}{', graphs' if graphs else ''}"
            found[name] = _measured(model, _prompt(model, batch, options), options)
            shown = {kind: one["overhead_ms"]["p50"] for kind, one in found[name].items()}
            print(f"{name:26} " + "  ".join(f"{k} {v:6.3f} ms" for k, v in shown.items()))
    result = {
        "size": options.size,
        "schedule": str(schedule),
        "backend": options.backend,
        "vision_tokens": options.vision_tokens,
        "text_tokens": options.text_tokens,
        "steps": options.steps,
        "rounds": options.rounds,
        "environment": measure.environment(),
        "calls": found,
    }
    measure.write(f"overhead-{options.size}-{options.backend}", result, options.output)


@torch.no_grad()
def _measured(model: Any, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    _generate(model, inputs, options.steps, lambda kind, call: call())  # compile, record
    program, rest = Stopwatch(), Stopwatch()
    runtime = runtime_of(model)
    assert runtime is not None
    executables = [
        run for found in runtime.programs.captures.values() for run in found.executables.values()
    ]
    tops = [run.run_top for run in executables]
    times: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": [], "decode_alone": []}

    def timed(kind: str, call: Callable[[], Any]) -> Any:
        program.seconds = rest.seconds = 0.0
        started = time.perf_counter()
        output = call()
        total = time.perf_counter() - started
        times[kind].append((total - program.seconds - rest.seconds, program.seconds))
        return output

    for run in executables:
        run.run_top = program.around(run.run_top)
    try:
        with rest.on_module(model.get_input_embeddings()), rest.on_module(model.lm_head):
            for _ in range(options.rounds):
                _generate(model, inputs, options.steps, timed)
    finally:
        for run, top in zip(executables, tops, strict=True):
            run.run_top = top
    assert all(seconds > 0 for taken in times.values() for _, seconds in taken)
    return {kind: _summary(taken) for kind, taken in times.items()}


def _generate(
    model: Any, inputs: Inputs, steps: int, call: Callable[[str, Callable[[], Any]], Any]
) -> None:
    """Run a prompt, `steps` tokens as `generate` does and `steps` without it; `call` makes each call."""
    given = {"use_cache": True, "logits_to_keep": 1}
    output = call("prefill", lambda: model(**inputs, **given))
    token = inputs["input_ids"][:, -1:]
    mask: Tensor | None = inputs.get("attention_mask")
    ids = inputs["position_ids"][:, -1:]
    turn = Turn()
    for place in range(2 * steps):
        ids = ids + 1
        step = {"input_ids": token, "position_ids": ids, "past_key_values": output.past_key_values}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            step["attention_mask"] = mask
        if place < steps:
            step[TURN] = turn
        call(
            "decode" if place < steps else "decode_alone", lambda step=step: model(**step, **given)
        )


def _prompt(model: Any, batch: int, options: argparse.Namespace) -> Inputs:
    """Make one prompt, or several of different lengths, padded on the left."""
    inputs: Inputs = geometries.prompt(
        model,
        batch=batch,
        vision_tokens=options.vision_tokens,
        text_tokens=options.text_tokens,
    )
    if batch > 1:
        mask = torch.ones_like(inputs["input_ids"])
        for row in range(1, batch):
            mask[row, : min(row, options.text_tokens // 4)] = 0
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def _summary(taken: list[tuple[float, float]]) -> dict[str, Any]:
    overhead, program = zip(*taken, strict=True)
    milliseconds = [seconds * 1e3 for seconds in overhead]
    return {
        "overhead_ms": {"fastest": min(milliseconds), **measure.percentiles(milliseconds)},
        "program_ms": statistics.median(program) * 1e3,
        "calls": len(taken),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="32x64", choices=[*geometries.SIZES, geometries.SHIPPED])
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--backend", default="eager", choices=("eager", "aot_eager", "inductor"))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--vision-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
