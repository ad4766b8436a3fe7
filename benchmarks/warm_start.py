"""From a fresh process to the first token and a decode step: cold, and with what an earlier one left.

    python warm_start.py --size 32x256

cold     a fresh cache directory
warm     another process, the same directory
loaded   another process, a fresh directory, and a file of `hidrop.save_compiled`

`--hf` adds Hugging Face's own decoder under torch.compile, prefill alone and without a cache, so
that it has less to do. Every start is a process of its own; imports and the making of the model are
left out of the times, and are the same for all.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Without it compiled HF breaks into four graphs at a check of its inputs.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import geometries
import measure
import torch

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of

PARTS = ("load", "capture", "passes", "dynamo", "compiler", "rest")
"""`compiler` is AOTAutograd and Inductor, or their caches; `rest` lowers, lays out and runs."""


def main() -> None:
    options = _parse()
    if options.start:
        print(json.dumps(_start_hf(options) if options.start == "hf" else _start(options)))
        return
    starts: dict[str, list[dict[str, Any]]] = {}
    environment = measure.environment("cpu")
    for _ in range(options.rounds):
        for name, found in _round(options).items():
            starts.setdefault(name, []).append(found)
    names = {name: _summary(runs) for name, runs in starts.items()}
    cold = names["cold"]["total_s"]["median"]
    worked = names["cold"]["cpu_s"]["median"]
    shares = {n: names[n]["total_s"]["median"] / cold for n in ("warm", "loaded")}
    cpu_shares = {n: names[n]["cpu_s"]["median"] / worked for n in ("warm", "loaded")}
    result = {
        "size": options.size,
        "batch": 1,
        "vision_tokens": options.vision_tokens,
        "text_tokens": options.text_tokens,
        "dtype": str(geometries.SIZES[options.size].dtype),
        "schedule": options.schedule,
        "rounds": options.rounds,
        "environment": environment,
        "load_after": os.getloadavg(),
        "starts": names,
        "share_of_cold": shares,
        "cpu_share_of_cold": cpu_shares,
    }
    for name, found in names.items():
        parts = ", ".join(
            f"{k} {found[f'{k}_s']['median']:.2f}" for k in PARTS if f"{k}_s" in found
        )
        print(
            f"{name:8} {found['total_s']['median']:7.2f} s ({found['cpu_s']['median']:.2f} s of CPU)  {parts}"
        )
    print(", ".join(f"{name} {share:.3f} of cold" for name, share in shares.items()))
    measure.write(f"warm-start-{options.size}-cpu", result, options.output)


def _round(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        first, second, third = (Path(folder) / name for name in ("first", "second", "third"))
        saved = str(Path(folder) / "saved")
        found = {
            "cold": _child(first, options, "cold", "--saved", saved),
            "warm": _child(first, options, "warm"),
            "loaded": _child(second, options, "loaded", "--saved", saved),
        }
        found["loaded"]["saved_bytes"] = Path(saved).stat().st_size
        if options.hf:
            found["hf_cold"] = _child(third, options, "hf")
            found["hf_warm"] = _child(third, options, "hf")
    return found


def _child(cache: Path, options: argparse.Namespace, start: str, *arguments: str) -> dict[str, Any]:
    shape = (f"--vision-tokens={options.vision_tokens}", f"--text-tokens={options.text_tokens}")
    wanted = (f"--size={options.size}", f"--schedule={options.schedule}", f"--start={start}")
    command = [sys.executable, __file__, *wanted, *shape, *arguments]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    print(
        f"{start:8} {found['total_s']:7.2f} s, {found['cpu_s']:.2f} s of CPU, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return found


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = {"median": statistics.median(values), "fastest": min(values)}
    return found


# In the process that is measured.


def _start(options: argparse.Namespace) -> dict[str, Any]:
    model, inputs = _model(options)
    hidrop.compile(model, options.schedule)
    # What any program that compiles has imported by then.
    import torch._inductor.compile_fx

    worked, started = _cpu_seconds(), time.perf_counter()
    if options.start == "loaded" and not hidrop.load_compiled(model, options.saved):
        raise SystemExit(f"{options.saved} was not loaded")
    loaded = time.perf_counter()
    with torch.no_grad():
        out = model(**inputs, logits_to_keep=1, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        model(input_ids=token, past_key_values=out.past_key_values, logits_to_keep=1)
    done, cpu = time.perf_counter(), _cpu_seconds() - worked
    if options.start == "cold":
        hidrop.save_compiled(model, options.saved)
    parts = _parts(model) | {"load_s": loaded - started}
    total = done - started
    return {
        "total_s": total,
        "cpu_s": cpu,
        "first_token_s": prefilled - started,
        "first_decode_s": done - prefilled,
        **parts,
        "rest_s": total - sum(parts.values()),
        **_hits(),
    }


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the C++ compilers it called: other work on the machine matters less."""
    users = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(user.ru_utime + user.ru_stime for user in users)


def _parts(model: Any) -> dict[str, float]:
    runtime = runtime_of(model)
    assert runtime is not None
    (capture,) = runtime.programs.captures.values()
    programs = [run.program for run in capture.executables.values()]
    passes = sum(stage.milliseconds for p in programs for stage in p.history[1:]) / 1e3
    frames = torch._dynamo.utils.calculate_time_spent().get("entire_frame_compile", 0.0)
    return {
        "capture_s": capture.decoder.seconds,
        "passes_s": passes,
        "dynamo_s": frames - runtime.programs.log.seconds,
        "compiler_s": runtime.programs.log.seconds,
    }


def _hits() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {
        "fxgraph_cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "fxgraph_cache_misses": counters["inductor"]["fxgraph_cache_miss"],
        "aot_cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "aot_cache_bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    }


def _start_hf(options: argparse.Namespace) -> dict[str, Any]:
    model, inputs = _model(options)
    import torch._inductor.compile_fx

    forward = torch.compile(model.forward)
    worked, started = _cpu_seconds(), time.perf_counter()
    with torch.no_grad():
        forward(**inputs, logits_to_keep=1, use_cache=False)
    total = time.perf_counter() - started
    return {"total_s": total, "cpu_s": _cpu_seconds() - worked, **_hits()}


def _model(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = geometries.build(geometries.SIZES[options.size])
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    return model, geometries.prompt(model, batch=1, **shape)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="32x256", choices=geometries.SIZES)
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--vision-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf", action="store_true")
    parser.add_argument("--output", default=None)
    # What a process that this script starts is to do.
    parser.add_argument("--start", choices=("cold", "warm", "loaded", "hf"), help=argparse.SUPPRESS)
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
