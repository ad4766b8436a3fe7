"""The programs of one model under one plan: the captured decoder rewritten and lowered at first use.

capture = programs.capture()                                  # of the decoder as it is now
run = programs.executable(capture, "prefill", Variant(output="chosen"))
"""

import logging
import time
import weakref
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.layers import base_of, text_decoder
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.outline import lower
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.models import family_of
from hidrop_fx.models.encoding import encode
from hidrop_fx.options import Options
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import Program
from hidrop_fx.program.tracing import trace_program
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.runtime.capture_store import CaptureStore
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.fingerprint import Fingerprint
from hidrop_fx.runtime.tower_state import TowerState
from hidrop_fx.runtime.vision import WithVision

logger = logging.getLogger("hidrop_fx")

Made = MutableMapping[Capture, Capture]
"""Of each capture in a store, the same with the executables made from it under one plan."""


class Programs:
    """Executables made from the captures of one model's decoder, under one plan.

    Attributes:
        store: the captures, what was compiled from them, and a log; other plans of the model may share it.
        on_program: called with each executable that was made.

    Args:
        store: None for one of its own.
        disable: names of passes that are left out, to see whether one is at fault.
        instrument: called with each program before it is lowered, e.g. to return more of it.
        made: executables made before, under a plan of the same structure.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        options: Options,
        *,
        store: CaptureStore | None = None,
        disable: Collection[str] = (),
        instrument: Callable[[Program], None] | None = None,
        made: Made | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.options = options
        self.store = CaptureStore(model, options) if store is None else store
        self.store.join(self)
        self.on_program: list[Callable[[Executable], None]] = []
        self.disabled = disable
        self._instrument = instrument
        self._made: Made = weakref.WeakKeyDictionary() if made is None else made

    @property
    def captures(self) -> dict[Fingerprint, Capture]:
        """Captures with the executables of this plan, by fingerprint of the decoder, the most recently used last."""
        return {key: self._own(found) for key, found in self.store.captures.items()}

    @property
    def log(self) -> CompileLog:
        """What was compiled and recorded."""
        return self.store.log

    @property
    def shape_policy(self) -> ShapePolicy:
        """Whether a call that would compile may."""
        return self.store.shape_policy

    def capture(self) -> Capture:
        """Return the capture of the decoder as it is now, made if there is none."""
        found = self.store.capture(self.plan.num_layers)
        if "twig" not in self.plan.schedule.modules:
            return self._own(found)
        return self._own(found, self.store.branch.capture(None).decoder)

    def known_capture(self) -> Capture | None:
        """Return the capture of the decoder as it is now, None if there is none yet."""
        found = self.store.known()
        return None if found is None else self._own(found)

    def fills(self, origin: Capture | None) -> bool:
        """Return True if a capture, as a cache names it, is one of these programs', and still there."""
        return any(self._made.get(found) is origin for found in self.store.captures.values())

    def _own(self, found: Capture, branch: CapturedDecoder | None = None) -> Capture:
        own = self._made.get(found)
        if own is None or (branch is not None and own.branch is not branch):
            with self.store.lock:
                own = self._made[found] = replace(found, executables={}, branch=branch)
        return own

    def trains(self, capture: Capture) -> bool:
        """Return True if programs may read something that requires a gradient, inputs aside."""
        return capture.trains or bool(
            self.options.passes
        )  # which may bring parameters of their own

    def executable(self, capture: Capture, kind: Kind, variant: Variant) -> Executable:
        """Return the program for a purpose, made at first use."""
        key = (kind, variant)
        with self.store.lock:
            if key not in capture.executables:
                started = time.perf_counter()
                with collection_paused():
                    made = self._make(capture, kind, variant)
                capture.executables[key] = made
                seconds = time.perf_counter() - started
                logger.info("made the %s program in %.1f s", kind, seconds)
                trace_program(made.program)
                for listener in self.on_program:
                    listener(made)
            return capture.executables[key]

    def lowering(self, kind: Kind) -> str:
        """Return "bodies" or "whole": what was asked for, or else what measured best for this kind.

        Layers that are called as modules, since FSDP2 shards them or accelerate offloads them, or that lie on several devices,
        are called one by one.
        """
        if self.store.sharded or self.store.placement is not None:
            return "bodies"
        if self.options.lowering is not None:
            return self.options.lowering
        return "whole" if kind == "decode" else "bodies"

    def program(
        self, capture: Capture, kind: Kind, variant: Variant, plan: Plan | None = None
    ) -> Program:
        """Rewrite the captured decoder for a purpose, without lowering it.

        Args:
            plan: another than that of these programs.
        """
        return build_program(
            capture.decoder,
            self.plan if plan is None else plan,
            kind,
            variant,
            kernel=self.options.attention,
            custom=self.options.passes,
            disable=self.disabled,
            branch=capture.branch,
        )

    def _make(self, capture: Capture, kind: Kind, variant: Variant) -> Executable:
        program = self.program(capture, kind, variant)
        if self._instrument is not None:
            self._instrument(program)
            program.module.recompile()
        made = lower(
            program,
            backend=self.options.backend,
            # Of one graph, the past would be an input that shares memory with one that is written.
            lowering="bodies" if variant.behind else self.lowering(kind),
            log=self.log,
            shape_policy=self.shape_policy,
            shared=self.store.bodies,
            memory_budget=self.options.activation_memory_budget,
            decoder=capture.source,
        )
        if not variant.overlap:
            return made
        decoder = text_decoder(self.model)
        towers = [m for m in base_of(self.model).children() if decoder not in m.modules()]
        return WithVision(made, self._encode_pixels, TowerState(towers, self.model.config))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the features [tokens, D] of all images."""
        encoded = encode(family_of(self.model), base_of(self.model), {"pixel_values": pixels})
        return torch.cat(encoded.features)
