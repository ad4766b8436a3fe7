"""A tiny model with its captured decoder, and the programs that tests make from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx

from hidrop_fx import Plan, Schedule
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.export import capture
from hidrop_fx.models import backbone_of
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.pipeline import pipeline
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.program.program import Program
from hidrop_fx.program.variant import Kind, Variant
from tests.support.models import tiny_llava

LAYERS, WIDTH, KV_HEADS, HEAD = 4, 32, 2, 8
Masks = tuple[tuple[str, MaskRule], ...]
FULL: dict[str, Any] = {"inject": 1, "prune": {2: 2}, "exit": 3}
"""Arguments of a schedule in which everything happens, at another layer each."""


def capture_of(model: Any) -> CapturedDecoder:
    """Capture a model's decoder with the mask types of its backbone."""
    types = backbone_of(model).layer_types(model.config.get_text_config())
    return capture(model.get_decoder(), layer_types=types)


class CapturedModel:
    """A tiny model and its capture."""

    def __init__(
        self, backbone: str = "llama", window: int | None = None, *, num_layers: int = LAYERS
    ) -> None:
        self.model: Any = tiny_llava(
            backbone, num_layers=num_layers, kv_heads=KV_HEADS, sliding_window=window
        )
        self.captured = capture_of(self.model)
        self._built: dict[Any, Program] = {}

    def program(
        self, kind: Kind = "train", captured: CapturedDecoder | None = None, **schedule: Any
    ) -> Program:
        """Return a program to which no pass has been applied."""
        return Program(
            captured or self.captured, Plan.of(Schedule(**schedule), depth_of(self.model)), kind
        )

    def program_before(
        self, rewrite: Any, kind: Kind = "train", *, masks: Masks = (), **schedule: Any
    ) -> Program:
        """Return a program to which the passes that come before `rewrite` were applied."""
        program = self.program(kind, **schedule)
        for step, options in pipeline.passes_for(kind, Variant(masks=masks)):
            if step is rewrite:
                break
            program.apply(step, **options)
        return program

    def finished(self, kind: Kind = "train", output: Any = "all", **schedule: Any) -> Program:
        """Apply every pass, as `build_program` does, without its check of lengths, which takes most of its time."""
        program = self.program(kind, **schedule)
        for step, options in pipeline.passes_for(kind, Variant(output=output)):
            program.apply(step, **options)
        program.module.recompile()
        return program

    def built(self, kind: Kind, schedule: Schedule, output: Any = "all") -> Program:
        """Return `build_program`'s program; made once for equal arguments, and not to be changed."""
        key = (kind, schedule, output)
        if key not in self._built:
            self._built[key] = build_program(
                self.captured, Plan.of(schedule, depth_of(self.model)), kind, Variant(output=output)
            )
        return self._built[key]

    def edited(self, edit: Callable[[fx.Graph], None]) -> CapturedDecoder:
        """Return a capture with a change to its graph; the shared one stays as it is."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.captured.module.graph, {}))
        edit(graph)
        module = fx.GraphModule(self.captured.module, graph)
        return dataclasses.replace(self.captured, module=module)
