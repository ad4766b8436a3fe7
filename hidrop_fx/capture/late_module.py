"""A graph module that becomes Python code when it is first called or read: most are only rewritten and lowered.

module = LateModule(tensors, graph, "Program")
module.recompile()      # after a change of the graph, as for any GraphModule; costs nothing
module(...)             # writes the code now, and runs it
"""

from typing import Any

from torch import fx


class LateModule(fx.GraphModule):
    """A `torch.fx.GraphModule` whose `recompile` leaves the work to the first call after it."""

    def recompile(self) -> Any:
        """Note that the code is out of date."""
        # Each GraphModule has a class of its own, which holds its forward.
        type(self).forward = LateModule.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Write the code of the graph, whose forward takes this one's place, and run it."""
        super().recompile()
        return self(*args, **kwargs)

    @property
    def code(self) -> str:
        """The graph as Python."""
        if type(self).forward is LateModule.forward:
            super().recompile()
        return super().code

    def __str__(self) -> str:
        _ = self.code
        return super().__str__()

    def __reduce__(self) -> Any:
        # Pickled as a plain one, whose form on disk is torch's.
        return fx.GraphModule(self, self.graph, type(self).__name__).__reduce__()
