"""accelerate's FSDP2 plug-in on processes of a CPU: it takes it on accelerators alone, in one line of its state.

with plugin_on_cpu(rank):
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate import state
from accelerate.utils import DistributedType

_PREFIXES = ("ACCELERATE_", "FSDP_")


def take_cpus() -> Any:
    """Let accelerate's state accept the plug-in on a CPU; returns the patch, started."""
    made: Any = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    started = patch.object(state.AcceleratorState, "__init__", init)
    started.start()
    return started


@contextmanager
def plugin_on_cpu(rank: int, world: int = 2) -> Iterator[None]:
    """Run a process of a group that is there as one of a launcher's, and leave nothing of accelerate's behind."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    with patch.dict(os.environ, {k: str(v) for k, v in place.items()}):
        for name in [name for name in os.environ if name.startswith(_PREFIXES)]:
            del os.environ[name]
        started = take_cpus()
        try:
            yield
        finally:
            started.stop()
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
