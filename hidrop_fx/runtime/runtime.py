"""What runs in place of a compiled model's forward: prefill, decode, and the programs for them.

    states = runtime.run(inputs)      # hidden states, cache, image features
    logits = lm_head(states.hidden)

A `Runtime` belongs to one model. It captures the decoder at the first call, and again only when the
decoder's `fingerprint` changed.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.lowering.body import Body
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.outline import lower
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.models import Family, family_of
from hidrop_fx.options import Options
from hidrop_fx.pipeline.pipeline import Variant, build_program
from hidrop_fx.planning import Plan
from hidrop_fx.planning.layout import Layout
from hidrop_fx.program.program import Kind, Program
from hidrop_fx.program.tracing import DEBUG_VARIABLE, trace_program
from hidrop_fx.runtime.captures import Capture, capture_model
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.decode import decode
from hidrop_fx.runtime.fingerprint import DecoderSnapshot, Fingerprint
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import DecoderOutput, Rows
from hidrop_fx.runtime.prefill import prefill
from hidrop_fx.runtime.vision import WithVision
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios

logger = logging.getLogger("hidrop_fx")

RATIOS = "hidrop_ratios"
"""Attribute of a model under the name of which its learned ratios are found."""

# Train and eval mode, adapters on and off alternate; older states of the model are let go, with their parameters.
_CAPTURES = 8


class Runtime:
    """The compiled side of one model.

    Attributes: disabled: names of passes that are left out, to see whether one is at fault.
    """

    disabled: Collection[str] = ()

    def __init__(self, model: Any, schedule: Schedule, plan: Plan, options: Options) -> None:
        self.model = model
        self.schedule = schedule
        self.plan = plan
        self.options = options
        self._reset()

    def _reset(self) -> None:
        self.captures: dict[Fingerprint, Capture] = {}
        self._watch: DecoderSnapshot | None = None
        self.bodies: dict[str, Body] = {}
        self.log = CompileLog()
        self.last_layout: Layout | None = None
        self.last_cache_bytes: int | None = None
        self.shape_policy = ShapePolicy(self.options.on_new_shape)
        self.graphs = None
        if self.options.cuda_graphs:
            self.graphs = GraphRunner(self.log, self.shape_policy, self.options.max_graphs)
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "schedule", "plan", "options")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def ratios(self) -> Ratios | None:
        """What `selection="dtopk"` learns; a submodule of the model."""
        found: Ratios | None = getattr(self.model, RATIOS, None)
        return found

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.model

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    # One call.

    @torch.compiler.disable  # torch.compile(model, ...) around all this would trace the tracing
    def run(
        self,
        inputs: dict[str, Any],
        *,
        labels: Tensor | None = None,
        rows: Rows = "all",
        draft: int = 0,
    ) -> DecoderOutput:
        """Hidden states for the inputs of a forward.

        Args:
            labels: which columns are supervised; they choose the score's queries in training.
            rows: of which columns: "all", each row's "last", or those of the "text" stream.
            draft: tokens behind the prompt that an assistant proposed.
        """
        self._refuse(inputs)
        if labels is None and self.model.training and torch.is_grad_enabled():
            self._say_labels_are_missing()
        cache = inputs.get("past_key_values")
        if cache is not None and not isinstance(cache, HidropCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; a compiled model keeps another number "
                "of tokens in every layer and takes only the cache that its own forward or generate "
                "returned. Pass None, or call hidrop.restore(model) first"
            )
        with _outside_inference_mode():
            return self._run(inputs, cache, labels, rows, draft)

    def _run(
        self,
        inputs: dict[str, Any],
        cache: HidropCache | None,
        labels: Tensor | None,
        rows: Rows,
        draft: int,
    ) -> DecoderOutput:
        if cache is not None and cache.get_seq_length() > 0:
            if labels is not None:
                raise InputError(
                    "labels came with a cache that holds a prompt; train on the whole text, with "
                    "past_key_values=None"
                )
            with cache.turn():
                return decode(self, inputs, cache, rows)
        if cache is None and self._wants_cache(inputs, labels):
            cache = HidropCache()
        if cache is not None and self.graphs is not None:
            cache.pool = self.graphs.pool
        try:
            with nullcontext() if cache is None else cache.turn():
                return prefill(self, inputs, cache, labels, rows, draft)
        except BaseException:
            if cache is not None:
                cache.reset()
            raise

    def _refuse(self, inputs: dict[str, Any]) -> None:
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise InputError("pass exactly one of input_ids and inputs_embeds")
        ids = inputs.get("input_ids")
        if ids is not None and (ids.dim() != 2 or ids.numel() == 0):
            raise InputError(
                f"input_ids has shape {tuple(ids.shape)}; it must be [batch, length], neither zero"
            )
        if self.wants(inputs, "output_attentions"):
            raise InputError(
                "output_attentions=True is not available: the attention of a compiled model is fused. "
                "Call hidrop.restore(model) to look inside the original"
            )

    def _say_labels_are_missing(self) -> None:
        if self.schedule.prune or self.schedule.exit is not None:
            self.once(
                "training without labels (a loss of its own, label smoothing, compute_loss_func?): the "
                "last token of each row scores its vision tokens, and a dropped token has zero logits, "
                "also where it predicts the word behind an image. Pass labels to forward; a loss of "
                "your own goes into model.loss_function",
                logging.WARNING,
            )

    def wants(self, inputs: dict[str, Any], name: str) -> bool:
        """An output that is asked for in a call, or else in the model's configuration."""
        wanted = inputs.get(name)
        if wanted is None:
            configs = (self.model.config, self.model.config.get_text_config())
            wanted = any(getattr(config, name, False) for config in configs)
        return bool(wanted)

    def _wants_cache(self, inputs: dict[str, Any], labels: Tensor | None) -> bool:
        wanted = inputs.get("use_cache")
        if self.model.training and labels is not None:
            if wanted:
                logger.info(
                    "use_cache=True has no effect in training with labels: no cache is filled"
                )
            return False
        if wanted is None:
            default = getattr(self.model.config.get_text_config(), "use_cache", True)
            return bool(default) and not self.model.training and labels is None
        return bool(wanted)

    def once(self, message: str, level: int = logging.INFO) -> None:
        """Log a line that would otherwise come with every call."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, message)

    # Programs.

    def capture(self) -> Capture:
        """The capture of the decoder as it is now."""
        decoder = self.decoder
        with self._lock:
            if self._watch is None or not self._watch.unchanged(decoder):
                self._watch = DecoderSnapshot(decoder)
            key = self._watch.key
            if key in self.captures:
                found = self.captures.pop(key)
            else:
                if self.captures:
                    logger.info("the model changed since it was captured; capturing it again")
                    self._let_go()
                with collection_paused():
                    found = capture_model(self.model)
            self.captures[key] = found
            while len(self.captures) > _CAPTURES:
                self.captures.pop(next(iter(self.captures)))
                self._forget_recordings()
            return found

    def _let_go(self) -> None:
        """Free the memory of parameters that the model has replaced."""
        decoder = self.decoder
        kept = {k: c for k, c in self.captures.items() if not c.outlived_by(decoder)}
        if len(kept) < len(self.captures):
            self.captures = kept
            self._forget_recordings()
            gc.collect()  # graphs are circles of references

    def _forget_recordings(self) -> None:
        if self.graphs is not None:
            self.graphs.keep_only(e for c in self.captures.values() for e in c.executables.values())

    def take_captures(self, other: "Runtime") -> None:
        """Begin with the captures of another runtime of the same model: they know of no schedule."""
        self.captures = {k: replace(found, executables={}) for k, found in other.captures.items()}

    def executable(self, capture: Capture, kind: Kind, variant: Variant) -> Executable:
        """The program for a purpose, made at first use."""
        key = (kind, variant)
        with self._lock:
            if key not in capture.executables:
                started = time.perf_counter()
                with collection_paused():
                    made = self._make(self._program(capture, kind, variant), variant)
                capture.executables[key] = made
                seconds = time.perf_counter() - started
                logger.info("made the %s program in %.1f s", kind, seconds)
                self._note_program(made.program)
            return capture.executables[key]

    def _program(self, capture: Capture, kind: Kind, variant: Variant) -> Program:
        return build_program(
            capture.decoder,
            self.plan,
            kind,
            variant,
            kernel=self.options.attention,
            own=self.options.passes,
            disable=self.disabled,
        )

    def _make(self, program: Program, variant: Variant) -> Executable:
        made = lower(
            program,
            backend=self.options.backend,
            lowering=self._lowering(program.kind),
            log=self.log,
            shape_policy=self.shape_policy,
            shared=self.bodies,
            memory_budget=self.options.activation_memory_budget,
        )
        return WithVision(made, self.encode_pixels) if variant.overlap else made

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features [tokens, D] of all images."""
        return torch.cat(self.family.encode_images(self.base, {"pixel_values": pixels}))

    @property
    def overlaps_vision(self) -> bool:
        """Whether this schedule and these options let the vision tower run beside text-only layers."""
        wanted = self.options.overlap_vision
        if wanted is None:
            wanted = self.model.device.type == "cuda"
        if not wanted or self.schedule.inject == 0:
            return False
        if self._lowering("prefill") == "whole":
            self.once(
                "lowering='whole' leaves no place to wait for an overlapped tower: the tower runs first"
            )
            return False
        return True

    def _note_program(self, program: Program) -> None:
        """Let torch's structured log have the graphs, and a directory if the environment names one."""
        trace_program(program)
        if os.environ.get(DEBUG_VARIABLE):
            from hidrop_fx.inspection.dumps.folder import dump_for_debugging

            dump_for_debugging(self, os.environ[DEBUG_VARIABLE])

    def _lowering(self, kind: Kind) -> str:
        if self.options.lowering is not None:
            return self.options.lowering
        return "whole" if kind == "decode" else "bodies"


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, whose tensors are of a kind that nothing compiled or recorded outside takes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
