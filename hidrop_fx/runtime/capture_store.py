"""Captures of one model's decoder, and the layer bodies compiled from them: what all its schedules share.

store = CaptureStore(model, options)
found = store.capture(num_layers=32)      # of the decoder as it is now

A captured graph depends on the state of the decoder, and a compiled body on its structure; neither on how many
vision tokens a schedule keeps.
"""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.placement import Placement, placement_of
from hidrop_fx.capture.sharded import is_sharded
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.runtime.captures import Capture, capture_model, check_gradients
from hidrop_fx.runtime.fingerprint import (
    DecoderSnapshot,
    Fingerprint,
    ShardedSnapshot,
    described,
    snapshot_of,
)
from hidrop_fx.runtime.given_modules import BranchDecoder
from hidrop_fx.runtime.python_state import Label

if TYPE_CHECKING:
    from hidrop_fx.runtime.programs import Programs

logger = logging.getLogger("hidrop_fx")

# Train and eval mode, adapters on and off alternate; older states of the model are evicted, with their parameters.
_CAPTURES = 8


class CaptureStore:
    """Captures of one model's decoder, one for each state of it, and the compiled functions made from them.

    Attributes:
        captures: by fingerprint of the decoder, the most recently used last.
        bodies: compiled functions that layers share, by structure.
        log: what was compiled and recorded.
        branch: such a store of the side branch, where a schedule reads one.
        shape_policy: whether a call that would compile may.
        lock: held while anything is captured, made or looked up.
        on_eviction: called after captures were evicted.
        sharded: True if FSDP2 shards the decoder, as it was when it was last looked at.
        agreed: the plan that all processes were last found to run, where they share the decoder's parameters.
        mesh: the device mesh of those processes.
    """

    def __init__(
        self, model: Any, options: Options, decoder: Callable[[], Any] | None = None
    ) -> None:
        self.model = model
        self.options = options
        self._decoder: Callable[[], Any] = decoder or partial(text_decoder, model)
        self.captures: dict[Fingerprint, Capture] = {}
        self.bodies: dict[str, Body] = {}
        self.log = CompileLog()
        self.shape_policy = ShapePolicy(options.on_new_shape)
        self.lock = threading.RLock()
        self.sharded = False
        self.agreed: Plan | None = None
        self.mesh: Any = None
        self._placements: list[Placement | None] = []
        self.on_eviction: list[Callable[[], None]] = []
        self._clients: weakref.WeakSet[Programs] = weakref.WeakSet()
        self._snapshot: DecoderSnapshot | None = None
        self._written: set[Label] = set()

    @property
    def placement(self) -> Placement | None:
        """Where the decoder computes, if that is not one device, as it was when it was last looked at."""
        if not self._placements:
            decoder = self._decoder()
            self._placements = [None if is_sharded(decoder) else placement_of(decoder)]
        return self._placements[0]

    @cached_property
    def branch(self) -> "CaptureStore":
        """Captures of the layers of the model's side branch."""
        return CaptureStore(self.model, self.options, BranchDecoder(self.model))

    def capture(self, num_layers: int | None) -> Capture:
        """Return the capture of the decoder as it is now, made if there is none.

        Args:
            num_layers: layers that it must have; None for any number.
        """
        decoder = self._decoder()
        with self.lock:
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
                    found = capture_model(self.model, num_layers, decoder)
                snapshot = self._without_written(snapshot)
            self._snapshot = snapshot
            self.captures[snapshot.key] = found
            while len(self.captures) > _CAPTURES:
                self.captures.pop(next(iter(self.captures)))
                self._note_eviction()
            check_gradients(found, decoder)
            return found

    def known(self) -> Capture | None:
        """Return the capture of the decoder as it is now, None if there is none yet."""
        with self.lock:
            return self.captures.get(self._current(self._decoder()).key)

    def begin_with(self, other: "CaptureStore") -> None:
        """Take over the captures of another store of the same model, but nothing that was compiled from them."""
        self.captures = dict(other.captures)
        self._written = set(other._written)
        if "branch" in other.__dict__:
            self.branch.begin_with(other.branch)

    def join(self, programs: "Programs") -> None:
        """Count the programs of a schedule among those made from these captures, while they are alive."""
        with self.lock:
            self._clients.add(programs)

    def leave(self, programs: "Programs") -> None:
        """Count the programs of a schedule that is gone no longer, though a call may still run them."""
        with self.lock:
            self._clients.discard(programs)

    def executables(self) -> list[Executable]:
        """Return what the programs of every schedule made from captures that are still there, in no order."""
        with self.lock:
            captures = [c for programs in self._clients for c in programs.captures.values()]
            return [made for capture in captures for made in capture.executables.values()]

    def _current(self, decoder: Any) -> DecoderSnapshot:
        snapshot = self._snapshot
        if snapshot is None or snapshot.decoder is not decoder or not snapshot.unchanged():
            snapshot = snapshot_of(decoder, self._written)
            self.sharded = isinstance(snapshot, ShardedSnapshot)
            self._placements = [None if self.sharded else placement_of(decoder)]
        return snapshot

    def _without_written(self, before: DecoderSnapshot) -> DecoderSnapshot:
        """Leave out of a snapshot what the decoder's code has itself written while it was captured.

        Otherwise every call would capture the decoder anew.
        """
        after = snapshot_of(before.decoder, self._written)
        written = before.key.differences(after.key)
        if not written:
            return after
        logger.warning(
            "the decoder's code writes %s when it runs; a compiled model does so only while it is "
            "captured, and what reads it is as it was then",
            described(written),
        )
        self._written |= set(written)
        return snapshot_of(before.decoder, self._written)

    def _evict_outlived(self) -> None:
        """Free the memory of parameters that the model has replaced."""
        decoder = self._decoder()
        kept = {k: c for k, c in self.captures.items() if not c.outlived_by(decoder)}
        if len(kept) < len(self.captures):
            self.captures = kept
            self._note_eviction()
            gc.collect()  # graphs are circles of references

    def _note_eviction(self) -> None:
        for listener in self.on_eviction:
            listener()
