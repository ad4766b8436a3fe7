"""Triton and Inductor as they are where an H100 is."""

from __future__ import annotations

import os
import traceback
import types
from typing import Any

import torch

KERNELS: dict[str, int] = {}
"""Source of each Triton kernel, and how many configurations of it were compiled for sm_90."""

FAILURES: list[str] = []
"""What could not be lowered or compiled."""


class _NoKernel:
    def run(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel of CUDA does not run on the simulation")


def install() -> None:
    """Let Inductor compile for sm_90, in this process and for good; after the simulation's own `install`."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda *_: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
            utils=types.SimpleNamespace(),
        )
    )
    _find_triton()
    _configure()
    torch.version.cuda = torch.version.cuda or "13.0"
    if not hasattr(torch._C, "_cuda_getCurrentStream"):
        torch._C._cuda_getCurrentStream = lambda *_: 0


def note_failure(name: str, error: Exception) -> None:
    """Add what could not be compiled, and where, to the failures."""
    message = (str(error).strip().splitlines() or [""])[0][:200]
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames))
    FAILURES.append(f"{name}: {type(error).__name__}: {message} ({places})")


def _find_triton() -> None:
    """Say yes to who asks for a GPU that Triton compiles for."""
    import torch._inductor.scheduler
    import torch._inductor.utils
    import torch.utils._triton as probing
    from torch._inductor import async_compile, compile_fx
    from torch._inductor.runtime import triton_helpers

    def found(*_: Any, **__: Any) -> bool:
        return True

    triton_helpers.set_driver_to_gpu = lambda: None
    modules = (probing, torch._inductor.scheduler, torch._inductor.utils, async_compile, compile_fx)
    for module in modules:
        for name in ("has_triton", "has_triton_package"):
            if hasattr(module, name):
                setattr(module, name, found)
    async_compile.AsyncCompile.triton = _compiled


def _configure() -> None:
    import torch._functorch.config
    import torch._inductor.config as config

    config.compile_threads = 1
    config.joint_graph_constant_folding = False  # it runs operators on the device
    config.shape_padding = False  # it times products on the device
    config.fx_graph_cache = False
    config.triton.autotune_at_compile_time = False
    torch._functorch.config.enable_autograd_cache = False


def _compiled(_: Any, name: str, source: str, device_str: str = "cuda") -> _NoKernel:
    """Compile every configuration of a kernel, in the place of `AsyncCompile.triton`."""
    from torch._inductor.codecache import PyCodeCache

    if source not in KERNELS:
        KERNELS[source] = 0
        try:
            kernel = getattr(PyCodeCache.load(source), name)
            for configuration in kernel.configs:
                kernel._precompile_config(configuration)
                KERNELS[source] += 1
        except Exception as error:
            note_failure(name, error)
    return _NoKernel()
