"""Which kernels PyTorch's attention may take on CUDA.

On an H100 `scaled_dot_product_attention` prefers cuDNN's kernels, which build a plan for every new shape, for some
tenths of a second each. In generation every token has new shapes. So they are left out, and flash, memory-efficient
and plain ones remain; except for recorded graphs, whose shapes are fixed, under `attention="cudnn"`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cuda


class _CudnnPause:
    """The process-wide switch of cuDNN's attention, off while any thread is in a call that leaves it out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._switched = False

    def begin(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._switched = cuda.cudnn_sdp_enabled() and _others_enabled()
                if self._switched:
                    cuda.enable_cudnn_sdp(False)

    def end(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0 and self._switched:
                cuda.enable_cudnn_sdp(True)


_PAUSE = _CudnnPause()


@contextmanager
def attention_kernels(device: torch.device, *, cudnn: bool) -> Iterator[None]:
    """Leave cuDNN's attention kernels out for the block; on other devices, and with `cudnn`, do nothing.

    Where a caller allows no other kernels (`torch.nn.attention.sdpa_kernel`), cuDNN's stay.
    """
    if cudnn or device.type != "cuda":
        yield
        return
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()


def _others_enabled() -> bool:
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
