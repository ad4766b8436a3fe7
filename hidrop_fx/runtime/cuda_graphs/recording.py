"""A function recorded once and replayed: as a CUDA graph on a GPU, by plain calls elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recording:
    """A function without arguments whose results land in the same tensors at every replay."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], pool: Any) -> None:
        self.function = function
        self.outputs: list[Tensor] = []
        self._graph: Any = None
        self._record(pool)

    def replay(self) -> None:
        """Compute the outputs anew, from what the function's inputs hold now."""
        if self._graph is not None:
            self._graph.replay()
            return
        for static, fresh in zip(self.outputs, self.function(), strict=True):
            static.copy_(fresh.detach())

    def _record(self, pool: Any) -> None:
        if pool is None:
            self.outputs = [value.detach().clone() for value in self.function()]
            return
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may go on with other work meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = [value.detach() for value in self.function()]
