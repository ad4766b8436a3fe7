"""Put the simulation into this process; there is no way back."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _python_dispatch
from torch.utils.cpp_extension import include_paths, library_paths

from hidrop_fx import surroundings
from tests.support.simulated_cuda import graphs, streams, tensors
from tests.support.simulated_cuda.dispatch import Watch
from tests.support.simulated_cuda.storages import LOCAL, as_device, current_device

DEVICES = 2

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


def install() -> None:
    """Install the simulation, before tensors are made for "cuda"; a second call does nothing."""
    if is_installed():
        return
    from torch._dynamo.callback import on_compile_start
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    _register_guard()
    get_torch_obj_rule_map()  # by the names of functions that are about to be replaced
    tensors.replace_methods()
    torch._subclasses.FakeTensorMode.avoid_device_init = True  # as where there is no GPU
    _replace_module()
    _stay_where_modes_are_left()
    on_compile_start(lambda *_: [c.invalidate("the compiler starts") for c in streams.CAPTURES])
    Watch().__enter__()


def is_installed() -> bool:
    return hasattr(tensors.REAL, "to")


def _register_guard() -> None:
    """Register a guard of CUDA devices that does nothing: a CPU build has none, which fake tensors need."""
    known = hashlib.sha256(f"{_GUARD}{torch.__version__}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"no_op_cuda_guard_{known}.so"
    if not library.exists():
        headers = [f"-I{path}" for path in include_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        with tempfile.TemporaryDirectory() as folder:
            source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(_GUARD)
            compiler = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", abi]
            libraries = [*(f"-L{path}" for path in library_paths()), "-lc10"]
            command = [*compiler, *headers, str(source), "-o", str(built), *libraries]
            subprocess.run(command, check=True)
            shutil.move(built, library)
    ctypes.CDLL(str(library))


def _stay_where_modes_are_left() -> None:
    """Stay in force where a decoder is traced, which hidrop_fx does outside of all dispatch modes."""

    @contextmanager
    def left() -> Iterator[Any]:
        with _python_dispatch._disable_current_modes() as modes, Watch():
            yield modes

    replaced = vars(_python_dispatch) | {"_disable_current_modes": left}
    surroundings._python_dispatch = types.SimpleNamespace(**replaced)


def _replace_module() -> None:
    properties = types.SimpleNamespace(
        name="simulated", major=9, minor=0, total_memory=1 << 36, multi_processor_count=132,
        warp_size=32, max_threads_per_multi_processor=2048, gcnArchName="",
        regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    replaced: dict[str, Any] = {
        "_lazy_init": _nothing, "init": _nothing, "is_initialized": lambda: True,
        "is_available": lambda: True, "device_count": lambda: DEVICES,
        "current_device": current_device, "device": streams.DeviceContext,
        "set_device": lambda device: setattr(LOCAL, "device", as_device(device).index),
        "_is_in_bad_fork": lambda: False, "Stream": streams.Stream, "Event": streams.Event,
        "stream": streams.StreamContext, "current_stream": streams.current_stream,
        "set_stream": streams.set_stream, "default_stream": streams.default_stream,
        "synchronize": streams.synchronize, "empty_cache": graphs.empty_cache,
        "CUDAGraph": graphs.SimulatedGraph, "graph_pool_handle": graphs.graph_pool_handle,
        "default_generators": graphs.GENERATORS,
        "is_current_stream_capturing": _is_capturing,
        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "simulated",
        "get_device_properties": lambda *_: properties,
        "_get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True, "ipc_collect": _nothing,
        "manual_seed": _nothing, "manual_seed_all": _nothing, "seed": _nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [], "set_rng_state_all": _nothing, "initial_seed": _zero,
        "memory_allocated": _zero, "max_memory_allocated": _zero, "memory_reserved": _zero,
        "max_memory_reserved": _zero, "reset_peak_memory_stats": _nothing,
        "mem_get_info": lambda *_: (1 << 36, 1 << 36), "memory_stats": lambda *_: {},
        "_exchange_device": _exchange, "_maybe_exchange_device": _exchange,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, _own(value))
    torch.cuda.graph.default_capture_stream = None
    core: dict[str, Any] = {
        "_host_emptyCache": _nothing, "_cuda_endAllocateToPool": graphs.end_allocate_to_pool,
        "_cuda_isCurrentStreamCapturing": _is_capturing, "_cuda_getDevice": current_device,
        "_cuda_setDevice": _exchange, "_cuda_exchangeDevice": _exchange,
        "_cuda_maybeExchangeDevice": _exchange, "_cuda_getCurrentRawStream": _zero,
        "_cuda_getDeviceCount": lambda: DEVICES,
    }  # fmt: skip
    for name, value in core.items():
        setattr(torch._C, name, _own(value))


def _own(value: Any) -> Any:
    """Return a function object for one name alone, as dynamo wants."""
    if not isinstance(value, types.FunctionType):
        return value
    return types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__
    )


def _is_capturing() -> bool:
    capture = streams.current_stream().capture
    return capture is not None and capture.underway


def _exchange(device: int) -> int:
    before = current_device()
    if device >= 0:
        LOCAL.device = device
    return before


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any, **__: Any) -> int:
    return 0
