"""Time contestants side by side, and write down everything needed to do it again."""

import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._inductor.utils import fresh_cache

import hidrop_fx

CALLS_A_TURN = 4
RESULTS = Path(__file__).parent / "results"


def interleaved(
    contestants: dict[str, Callable[[], Any]], *, rounds: int, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Time each call, in seconds; all take turns, so that a slow minute of the machine hits all alike.

    A turn is four calls, the first of them untimed: it finds the memory as the contestant before
    left it. `cpu_median_s` is the time that the process ran, without what others took of its cores.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    ran: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            call()
            for _ in range(CALLS_A_TURN - 1):
                before = time.process_time()
                times[name].append(seconds(call, device))
                ran[name].append(time.process_time() - before)
    return {
        name: {
            "median_s": statistics.median(taken),
            "fastest_s": min(taken),
            "slowest_s": max(taken),
            "cpu_median_s": statistics.median(ran[name]),
            "calls": len(taken),
        }
        for name, taken in times.items()
    }


def ratio(
    times: dict[str, dict[str, Any]], slower: str, faster: str, what: str = "median_s"
) -> float:
    """Return the ratio of medians: how many times faster."""
    return float(times[slower][what] / times[faster][what])


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Return the wall time of one call, the device's queue included."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile, interpolated between neighbours."""
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.99], dtype=torch.float64)
    )
    return dict(zip(("p50", "p99"), found.tolist(), strict=True))


def peak_memory(device: str = "cpu") -> dict[str, int]:
    """Return the peak bytes so far: of the process on a CPU, of the allocator on a GPU."""
    if device != "cpu":
        return {"cuda_peak_bytes": torch.cuda.max_memory_allocated()}
    return {"process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def saved_bytes(loss: Callable[[], Any]) -> int:
    """Count the bytes that a forward keeps for its backward, each storage once, parameters included."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = loss()
    del kept
    return sum(storages.values())


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions and hardware."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "hidrop_fx": hidrop_fx.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "load_before": os.getloadavg(),
    }


def write(name: str, result: dict[str, Any], output: str | None) -> Path:
    """Save a result as JSON, under `benchmarks/results/` unless told otherwise."""
    path = Path(output) if output else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join(sys.argv)
    path.write_text(json.dumps({"command": command, **result}, indent=2) + "\n")
    print(f"wrote {path}")
    return path


def first_calls(prepare: Callable[[], Callable[[], Any]], device: str = "cpu") -> dict[str, float]:
    """Time the first call in seconds, compilation and run: cold, and with Inductor's disk cache filled.

    Cold: nothing of this model is cached, but the compiler itself is loaded.
    Both start from empty caches in memory; what `prepare` returned last stays compiled. `cold_cpu_s` is the processor
    time of the cold call, C++ compilers included.
    """
    taken = {}
    with fresh_cache():
        # Imports and precompiled headers, which the first compilation of a process pays for all.
        torch.compile(torch.cos)(torch.ones(8, device=device))
        for name in ("cold_s", "warm_s"):
            torch._dynamo.reset()
            gc.collect()
            before = _processor_seconds()
            taken[name] = seconds(prepare(), device)
            taken.setdefault("cold_cpu_s", _processor_seconds() - before)
    return taken


def _processor_seconds() -> float:
    """Return the time that this process and those that it waited for have run."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
