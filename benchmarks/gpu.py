"""What only a GPU can tell, in nine minutes: first what works, then how fast it is.

    python benchmarks/gpu.py                        # everything that fits, in the order of what it decides
    python benchmarks/gpu.py --only prefill_b8      # one entry, or several, by name
    python benchmarks/gpu.py --size tiny --device cpu --compiler eager   # a dry run: what needs CUDA says so

The baseline is HF compiled as `mode="reduce-overhead"`, with its own CUDA graphs, and in decode a static cache.
Every entry is written into the JSON file as soon as it is known; one that fails says why, and the next begins;
one that may not end in time is left out and says so, one that does not is stopped. Weights are random and made on the device.
"""

import argparse
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Without it compiled HF breaks into several graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import gpu_figures as figures
import gpu_questions as questions
import measure
import torch


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One question or figure, and the seconds it may take on an H100: it does not begin with fewer left."""

    name: str
    seconds: int
    run: Callable[[argparse.Namespace], dict[str, Any]]


ENTRIES = (
    Entry(name="versions", seconds=5, run=questions.versions),
    Entry(name="failed_capture", seconds=10, run=questions.failed_capture),
    Entry(name="recorded_training", seconds=40, run=questions.recorded_training),
    Entry(name="inductor", seconds=80, run=questions.inductor),
    Entry(name="prefill_b8", seconds=120, run=figures.prefill_of(8)),
    Entry(name="decode_b1", seconds=90, run=figures.decode_of(1)),
    Entry(name="prefill_b1", seconds=100, run=figures.prefill_of(1)),
    Entry(name="train_stage2", seconds=150, run=figures.training_of("stage2")),
    Entry(name="decode_b8", seconds=90, run=figures.decode_of(8)),
    Entry(name="attention_plans", seconds=20, run=questions.attention_plans),
    Entry(name="varlen", seconds=20, run=questions.varlen),
    Entry(name="train_stage1", seconds=150, run=figures.training_of("stage1")),
    Entry(name="recording_memory", seconds=20, run=questions.recording_memory),
    Entry(name="capacity", seconds=60, run=figures.capacity),
    Entry(name="tests", seconds=150, run=questions.tests),
    Entry(name="sanitizer", seconds=80, run=questions.sanitizer),
)


def main() -> None:
    options = _parse()
    started = time.perf_counter()
    wanted = [e for e in ENTRIES if options.only is None or e.name in options.only]
    found: dict[str, Any] = {}
    result = {
        "size": options.size,
        "schedule": options.schedule,
        "environment": measure.environment(options.device),
        "entries": found,
    }
    name = f"gpu-{options.size}-{result['environment']['device'].replace(' ', '-')}"
    for entry in wanted:
        left = options.minutes * 60 - (time.perf_counter() - started)
        found[entry.name] = _answer(entry, options, left)
        print(f"{entry.name}: {found[entry.name]}", flush=True)
        measure.write(name, result, options.output)
    _print_table(found)


def _answer(entry: Entry, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run one entry; whatever it raises is its answer."""
    if left < entry.seconds:
        return {"left out": f"may take {entry.seconds} s, {left:.0f} s are left"}
    begun = time.perf_counter()
    try:
        with _at_most(left):
            answer = entry.run(options)
    except Exception as error:
        answer = {
            "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
            "trace": traceback.format_exc()[-1500:],
        }
    torch._dynamo.reset()
    gc.collect()
    if options.device != "cpu":
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture may have left another
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # nor must what it left end this
            answer["left behind"] = f"{type(error).__name__}: {error}"
    return {**answer, "took_s": round(time.perf_counter() - begun, 1)}


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s, when the time for all was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _print_table(found: dict[str, Any]) -> None:
    print(
        f"\n{'':16}{'hf, graphs':>12}{'hidrop_fx':>12}{'with graphs':>12}{'ratio':>8}{'bound':>8}"
    )
    for name, answer in found.items():
        if "milliseconds" not in answer:
            continue
        times = answer["milliseconds"]
        cells = [f"{times[key]:>12.3f}" for key in ("hf", "hidrop_fx", "hidrop_fx_graphs")]
        bound = answer.get("roofline_ms")
        print(
            f"{name:16}{''.join(cells)}{answer['ratio']:>7.2f}x"
            + (f"{bound:>8.3f}" if bound is not None else "")
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=None, choices=[e.name for e in ENTRIES])
    parser.add_argument("--size", default="llava-1.5-7b", choices=figures.SIZES)
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
