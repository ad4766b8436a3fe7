"""What recordings on one CUDA device share: a stream to warm up and capture on, and the memory of their graphs.

    with captures.aside():              # the current stream waits, before and after
        function()                      # warm up
        graph, outputs = captures.record(function)

A capture that fails takes one graph with it, and nothing else: `torch.cuda.graph` leaves its stream current, its
pool recording and, before torch 2.13, the generator in capture mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch.torch_version import TorchVersion

Result = TypeVar("Result")

GENERATOR_STAYS_CAPTURED = TorchVersion(torch.__version__) < "2.13"
"""A failed capture leaves the device's default generator in capture mode."""


class Captures:
    """The stream and the memory pool of all recordings on one device.

    Attributes:
        stream: where recordings are warmed up and captured, and their static tensors are allocated.
        underway: true while one is captured.

    One stream, since each that multiplies matrices gets a cuBLAS workspace of its own, 32 MiB on sm_90, for good.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)
        self.underway = False
        self._pool: Any = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the stream of the recordings, after the current stream's work and before its next.

        Where the block raises, all that a capture had taken is given back.
        """
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        try:
            # Restores the current one, which a failed capture does not.
            with torch.cuda.stream(self.stream):
                yield
        except BaseException:
            self._give_back()
            raise
        main.wait_stream(self.stream)

    def record(self, function: Callable[[], Result]) -> tuple[Any, Result]:
        """Capture a call of `function`, and return the CUDA graph with what it returned; within `aside`."""
        graph = torch.cuda.CUDAGraph()
        self.underway = True
        try:
            # "thread_local": another thread may go on with other work meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = function()
        finally:
            self.underway = False
        return graph, result

    def _give_back(self) -> None:
        """Bring allocator, generator and device back to where they were before a capture that failed."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError, AttributeError):  # it ended well, or never began
            torch._C._cuda_endAllocateToPool(index, self._pool)
        if GENERATOR_STAYS_CAPTURED:
            generator = torch.cuda.default_generators[index]
            with suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):  # the plain run raises what is still wrong
            torch.cuda.synchronize(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.device)
