"""The programs of one model: captured once for each state of its decoder, rewritten and lowered at first use.

capture = programs.capture()                                  # of the decoder as it is now
run = programs.executable(capture, "prefill", Variant(output="chosen"))
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.layer_body import Body
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
from hidrop_fx.runtime.captures import Capture, capture_model, check_gradients
from hidrop_fx.runtime.fingerprint import DecoderSnapshot, Fingerprint, described
from hidrop_fx.runtime.python_state import Label
from hidrop_fx.runtime.tower_state import TowerState
from hidrop_fx.runtime.vision import WithVision

logger = logging.getLogger("hidrop_fx")

# Train and eval mode, adapters on and off alternate; older states of the model are evicted, with their parameters.
_CAPTURES = 8


class Programs:
    """Captures of one model's decoder, and the executables made from them under one plan.

    Attributes:
        captures: by fingerprint of the decoder, the most recently used last.
        bodies: compiled functions that layers share, by structure.
        log: what was compiled and recorded.
        shape_policy: whether a call that would compile may.
        on_program: called with each executable that was made.
        on_eviction: called after captures were evicted.

    Args:
        disable: names of passes that are left out, to see whether one is at fault.
        instrument: called with each program before it is lowered, e.g. to return more of it.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        options: Options,
        *,
        disable: Collection[str] = (),
        instrument: Callable[[Program], None] | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.options = options
        self.captures: dict[Fingerprint, Capture] = {}
        self.bodies: dict[str, Body] = {}
        self.log = CompileLog()
        self.shape_policy = ShapePolicy(options.on_new_shape)
        self.on_program: list[Callable[[Executable], None]] = []
        self.on_eviction: list[Callable[[], None]] = []
        self.disabled = disable
        self._instrument = instrument
        self._snapshot: DecoderSnapshot | None = None
        self._written: set[Label] = set()
        self._lock = threading.RLock()

    def capture(self) -> Capture:
        """Return the capture of the decoder as it is now, made if there is none."""
        decoder = self.model.get_decoder()
        with self._lock:
            snapshot = self._current(decoder)
            if snapshot.key in self.captures:
                found = self.captures[snapshot.key]
                if next(reversed(self.captures.values())) is not found:
                    # At once: an interrupt between taking it out and putting it back would lose it.
                    others = {k: c for k, c in self.captures.items() if c is not found}
                    self.captures = {**others, snapshot.key: found}
            else:
                if self.captures:
                    logger.info(
                        "the model changed since it was captured (%s); capturing it again",
                        described(next(reversed(self.captures)).differences(snapshot.key)),
                    )
                    self._evict_outlived()
                with collection_paused():
                    found = capture_model(self.model, self.plan.num_layers)
                snapshot = self._without_written(snapshot)
            self._snapshot = snapshot
            self.captures[snapshot.key] = found
            while len(self.captures) > _CAPTURES:
                self.captures.pop(next(iter(self.captures)))
                self._note_eviction()
            check_gradients(found, decoder)
            return found

    def trains(self, capture: Capture) -> bool:
        """Return True if programs may read something that requires a gradient, inputs aside."""
        return capture.trains or bool(
            self.options.passes
        )  # which may bring parameters of their own

    def known_capture(self) -> Capture | None:
        """Return the capture of the decoder as it is now, None if there is none yet."""
        with self._lock:
            return self.captures.get(self._current(self.model.get_decoder()).key)

    def _current(self, decoder: Any) -> DecoderSnapshot:
        snapshot = self._snapshot
        if snapshot is None or snapshot.decoder is not decoder or not snapshot.unchanged():
            snapshot = DecoderSnapshot(decoder, self._written)
        return snapshot

    def _without_written(self, before: DecoderSnapshot) -> DecoderSnapshot:
        """Leave out of a snapshot what the decoder's code has itself written while it was captured.

        Otherwise every call would capture the decoder anew.
        """
        after = DecoderSnapshot(before.decoder, self._written)
        written = before.key.differences(after.key)
        if not written:
            return after
        logger.warning(
            "the decoder's code writes %s when it runs; a compiled model does so only while it is "
            "captured, and what reads it is as it was then",
            described(written),
        )
        self._written |= set(written)
        return DecoderSnapshot(before.decoder, self._written)

    def share_captures(self, other: "Programs") -> None:
        """Begin with the captures of other programs of the same model: they depend on no schedule."""
        self.captures = {k: replace(found, executables={}) for k, found in other.captures.items()}
        self._written = set(other._written)

    def executable(self, capture: Capture, kind: Kind, variant: Variant) -> Executable:
        """Return the program for a purpose, made at first use."""
        key = (kind, variant)
        with self._lock:
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
        """Return "bodies" or "whole": what was asked for, or else what measured best for this kind."""
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
        )

    def _make(self, capture: Capture, kind: Kind, variant: Variant) -> Executable:
        program = self.program(capture, kind, variant)
        if self._instrument is not None:
            self._instrument(program)
            program.module.recompile()
        made = lower(
            program,
            backend=self.options.backend,
            lowering=self.lowering(kind),
            log=self.log,
            shape_policy=self.shape_policy,
            shared=self.bodies,
            memory_budget=self.options.activation_memory_budget,
        )
        if not variant.overlap:
            return made
        decoder = self.model.get_decoder()
        towers = [module for module in self.model.model.children() if module is not decoder]
        return WithVision(made, self._encode_pixels, TowerState(towers, self.model.config))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the features [tokens, D] of all images."""
        encoded = encode(family_of(self.model), self.model.model, {"pixel_values": pixels})
        return torch.cat(encoded.features)

    def _evict_outlived(self) -> None:
        """Free the memory of parameters that the model has replaced."""
        decoder = self.model.get_decoder()
        kept = {k: c for k, c in self.captures.items() if not c.outlived_by(decoder)}
        if len(kept) < len(self.captures):
            self.captures = kept
            self._note_eviction()
            gc.collect()  # graphs are circles of references

    def _note_eviction(self) -> None:
        for listener in self.on_eviction:
            listener()
