"""The state of a compiled model that tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hidrop_fx as hidrop
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime


def runtime_in(model: Any) -> Runtime:
    """Return the runtime of a compiled model."""
    runtime = runtime_of(model)
    assert runtime is not None, "the model is not compiled"
    return runtime


def graph_runner(model: Any) -> GraphRunner:
    """Return the graph runner of a model that was compiled with `cuda_graphs=True`."""
    graphs = runtime_in(model).graphs
    assert graphs is not None, "the model was compiled without graphs"
    return graphs


def last_layout(model: Any) -> Layout:
    """Return the layout of the last batch."""
    layout = runtime_in(model).last_layout
    assert layout is not None, "the model was not called"
    return layout


@contextmanager
def compiled_eagerly(model: Any, schedule: Any, **options: Any) -> Iterator[None]:
    """Compile a model on the eager backend for the block, and restore it behind."""
    hidrop.compile(model, schedule, **{"backend": "eager"} | options)
    try:
        yield
    finally:
        hidrop.restore(model)
