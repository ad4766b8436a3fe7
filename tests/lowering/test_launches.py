"""Launches of a program, held against what a call of it does to memory, and against a layer counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hidrop_fx as hidrop
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.launches import launches
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import runtime_in

# No size of 1: what is transposed there is contiguous as it was, and not copied.
ROWS = [[5, 6, IMAGE, 6, 7, 8], [7, IMAGE, 8, 9]]


class Writes(TorchDispatchMode):
    """Counts operators whose results lie in memory that is not an argument's, or that write to an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = [v for v in torch.utils._pytree.tree_leaves(args) if isinstance(v, torch.Tensor)]
        given = {value.untyped_storage()._cdata for value in flat}
        found = [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
        fresh = any(value.untyped_storage()._cdata not in given for value in found)
        allocates = func._overloadpacket.__name__.startswith("empty")
        self.count += (func._schema.is_mutable or fresh) and not allocates
        return result


@pytest.mark.parametrize("schedule", ["identity", "inject=1,prune=2:2,exit=3"])
@pytest.mark.parametrize("lowering", ["bodies", "whole"])
def test_a_call_launches_what_is_counted(
    schedule: str, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[Executable, int]] = []
    original = Executable.__call__

    def watched(self: Executable, *args: Any, **kwargs: Any) -> Any:
        with Writes() as mode:
            result = original(self, *args, **kwargs)
        called.append((self, mode.count))
        return result

    monkeypatch.setattr(Executable, "__call__", watched)
    model = hidrop.compile(tiny_llava("llama"), schedule, backend="eager", lowering=lowering)
    new_tokens(model, batch(model, ROWS), 2)
    assert [made.program.kind for made, _ in called] == ["prefill", "decode"]
    for made, count in called:
        counted = launches(made)
        # The one row that a prune scores by is not copied where it is transposed; counted are any number of rows.
        prunes = schedule.count("prune") if made.program.kind == "prefill" else 0
        assert counted.total - prunes == count > 0
        in_bodies = sum(calls * each for calls, each in counted.bodies.values())
        assert in_bodies == counted.total if lowering == "whole" else 0 < in_bodies < counted.total
        in_layers = sum(counted.layers.values())
        assert in_layers == counted.total - counted.between
        if lowering == "whole":
            assert in_layers == 0
        elif prunes:  # what scores and moves tokens is no body on a CPU
            assert in_bodies < in_layers < counted.total
        else:
            assert in_bodies == in_layers


def test_equal_layers_share_what_a_body_launches() -> None:
    model = hidrop.compile(tiny_llava("llama"), "identity", backend="eager", lowering="bodies")
    new_tokens(model, batch(model, ROWS), 2)
    (capture,) = runtime_in(model).programs.captures.values()
    for made in capture.executables.values():
        ((calls, _),) = launches(made).bodies.values()
        assert calls == model.config.text_config.num_hidden_layers
