"""Take a batch apart as a compiled model does, without running its decoder.

batch = prepare(model, schedule, inputs)
batch.tensors["text_embeds"]      # what a program of this schedule would be given
batch.layout.counts               # tokens of every segment, row by row
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import Family
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.planning.layout import Layout
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch as the programs of a schedule are given it."""

    schedule: Schedule
    layout: Layout
    tensors: dict[str, Tensor]
    """Program inputs by name, KV buffers aside."""
    windows: dict[str, int]
    """Sliding window of each captured mask that has one."""

    @property
    def rows(self) -> int:
        return len(self.tensors["text_columns"])

    @property
    def columns(self) -> int:
        """L, the length of the prompt with its padding."""
        return self.layout.columns

    def row_columns(self, name: str, row: int) -> Tensor:
        """Columns [n] of a row's "text" or "vision" tokens, without the sentinel."""
        columns = self.tensors[f"{name}_columns"][row]
        return columns[columns < self.columns]


def prepare(
    model: Any,
    schedule: Schedule,
    inputs: Mapping[str, Any],
    *,
    encode: bool = True,
    grad: bool = False,
) -> Batch:
    """Lay a batch out and embed it.

    Args:
        inputs: what `model(...)` takes, labels included.
        encode: run the vision tower; otherwise image features are zeros of the right shape.
        grad: record what a backward into the embeddings and the tower needs.

    Raises:
        InputError: a compiled model would refuse these inputs.
    """
    runtime = _Collector(model, schedule, encode)
    given = {**inputs, "use_cache": False}
    labels = given.pop("labels", None)
    with torch.set_grad_enabled(grad):
        try:
            runtime.run(given, labels=labels, rows="last" if labels is None else "all")
        except _Collected as found:
            assert runtime.last_layout is not None
            return Batch(
                schedule=schedule,
                layout=runtime.last_layout,
                tensors=found.tensors,
                windows=dict(runtime.capture().windows),
            )
    raise AssertionError("a prefill that ran no program")


class _Collected(Exception):  # noqa: N818 - it carries a result
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors


class _Collector(Runtime):
    """A runtime whose programs hand back what they are given."""

    def __init__(self, model: Any, schedule: Schedule, encode: bool) -> None:
        options = Options(backend="eager", overlap_vision=False)
        super().__init__(model, schedule, Plan.of(schedule, depth_of(model)), options)
        self._encode = encode

    @property
    def family(self) -> Family:
        family = super().family
        return family if self._encode else replace(family, encode_images=self._zeros)

    @property
    def ratios(self) -> Ratios | None:
        """Those of the model, where they were learned under this schedule."""
        bound = runtime_of(self.model)
        known = bound is not None and bound.schedule == self.schedule
        return super().ratios if known else None

    def capture(self) -> Capture:
        bound = runtime_of(self.model)
        return super().capture() if bound is None else bound.capture()

    def executable(self, *args: Any, **kwargs: Any) -> Executable:
        return cast(Executable, self._collect)

    def _collect(self, tensors: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        raise _Collected(tensors)

    def _zeros(self, base: Any, inputs: dict[str, Any]) -> list[Tensor]:
        images = inputs[super().family.pixels]
        tokens = int(self.model.config.image_seq_length)
        weight = self.decoder.get_input_embeddings().weight
        return [weight.new_zeros(tokens, weight.shape[1]) for _ in range(len(images))]
