"""A function recorded once and replayed: as a CUDA graph on a GPU, by plain calls elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hidrop_fx.runtime.cuda_graphs.capturing import Captures


class Recording:
    """A function without arguments whose results land in the same tensors at every replay.

    Args:
        captures: of the device; None where replays are plain calls.
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], captures: Captures | None) -> None:
        self.outputs: list[Tensor] = []
        self._graph: Any = None
        self._function: Callable[[], Sequence[Tensor]] | None = None
        """None with a graph: an entry's own method would keep its memory until a garbage collection."""
        if captures is None:
            self._function = function
            self.outputs = [value.detach().clone() for value in function()]
        else:
            self._graph, outputs = captures.record(function)
            self.outputs = [value.detach() for value in outputs]

    def replay(self) -> None:
        """Compute the outputs anew, from what the function's inputs hold now."""
        if self._function is None:
            self._graph.replay()
            return
        for static, fresh in zip(self.outputs, self._function(), strict=True):
            static.copy_(fresh.detach())
