"""The runtime of a compiled model, in place of its forward: each call is prepared, then run.

output = runtime.call(inputs)      # hidden states, cache, image features
logits = lm_head(output.hidden)

prepared = runtime.prepare(inputs)
output = run(prepared, runtime.graphs)
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layer_wrappers import recomputes
from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.zero3 import buckets_gradients
from hidrop_fx.errors import CacheError, HidropError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import family_of
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.program.variant import Kind
from hidrop_fx.runtime.attention_kernels import attention_kernels
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.decode import prepare_decode
from hidrop_fx.runtime.division import Division
from hidrop_fx.runtime.engines import follow_capture, follow_division, overlaps_no_tower
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.later_turn import prepare_turn
from hidrop_fx.runtime.output import DecoderOutput, Rows
from hidrop_fx.runtime.prefill import prepare_prompt, prompt_context
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.run import decoder_output, execute
from hidrop_fx.runtime.scheduled_model import OnceLogger, ScheduledModel
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.surroundings import check_surroundings
from hidrop_fx.training.ratios import Ratios

logger = logging.getLogger("hidrop_fx")

RATIOS = "hidrop_ratios"
"""Attribute of a model under the name of which the learned ratios of its default schedule are found."""


class Runtime:
    """The compiled side of one model under one schedule: prepares and runs its calls.

    Attributes:
        name: of the schedule among those that the model was compiled with; None if it has none.
        ratios_at: attribute of the model under which the schedule's learned ratios are found.
        peers: runtimes of the same model under other schedules, and this one: they share captures, bodies and
            recorded graphs' memory.
        programs: what they run.
        graphs: records and replays them; None without CUDA graphs.
        on_program: functions of a module, called with this runtime when it has made a program; copies
            keep them.
        on_outputs: called with each prepared call and its program's outputs.
        last_layout: of the last prompt.
        last_cache_bytes: memory of the cache that it filled.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        plan: Plan,
        options: Options,
        programs: Programs | None = None,
        *,
        name: str | None = None,
        ratios_at: str = RATIOS,
    ) -> None:
        self.model = model
        self.name = name
        self.ratios_at = ratios_at
        self.schedule = schedule
        self.plan = plan
        self.options = options
        self.on_program: list[Callable[[Runtime], None]] = []
        self._reset(Programs(model, plan, options) if programs is None else programs)

    def _reset(self, programs: Programs, graphs: GraphRunner | None = None) -> None:
        self.peers: tuple[Runtime, ...] = (self,)
        self.programs = programs
        programs.on_program.append(self._note_program)
        self.last_layout: Layout | None = None
        self.last_cache_bytes: int | None = None
        self.log_once = OnceLogger()
        self.on_outputs: list[Callable[[PreparedCall, dict[str, Tensor]], None]] = []
        self.graphs = graphs
        if graphs is None and self.options.cuda_graphs:
            capacity = self.options.max_graphs
            self.graphs = GraphRunner(programs.log, programs.shape_policy, capacity)
            programs.store.on_eviction.append(self.evict_recordings)

    def join(self, other: "Runtime") -> None:
        """Share captures, bodies and recorded graphs' memory with another runtime of the same model."""
        store = other.programs.store
        self._reset(Programs(self.model, self.plan, self.options, store=store), other.graphs)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "name", "ratios_at", "schedule", "plan", "options", "on_program")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset(Programs(self.model, self.plan, self.options))

    def _note_program(self, made: Executable) -> None:
        for listener in self.on_program:
            listener(self)

    def under(self, schedule: Schedule | str) -> "Runtime | None":
        """Return the runtime of the same model under a schedule, or under the one of that name; None if there is none."""
        if self.schedule == schedule or self.name == schedule:
            return self
        return next((p for p in self.peers if p.name == schedule or p.schedule == schedule), None)

    @property
    def scheduled(self) -> ScheduledModel:
        """The model as its calls see it."""
        return ScheduledModel(
            model=self.model,
            plan=self.plan,
            family=family_of(self.model),
            ratios=self.ratios,
            log_once=self.log_once,
        )

    @property
    def ratios(self) -> Ratios | None:
        """Pruning ratios that `selection="dtopk"` learns; a submodule of the model.

        Raises:
            HidropError: they are gone.
        """
        if not self.schedule.learns:
            return None
        found: Ratios | None = getattr(self.model, self.ratios_at, None)
        if found is None:
            raise HidropError(
                f"model.{self.ratios_at}, which selection='dtopk' learns, is gone: it was deleted, or the model "
                "that this one is a shallow copy of was restored. Compile the model again"
            )
        return found

    @property
    def overlaps_vision(self) -> bool:
        """True if schedule and options let the vision tower run beside text-only layers."""
        wanted = self.options.overlap_vision
        if wanted is None:
            wanted = self.model.device.type == "cuda"
        if not wanted or self.schedule.inject == 0:
            return False
        engine = overlaps_no_tower(self)
        if engine is not None:
            self.log_once(engine)
            return False
        if self.programs.lowering("prefill") == "whole":
            self.log_once(
                "lowering='whole' leaves no place to wait for an overlapped tower: the tower runs first"
            )
            return False
        return True

    def call(
        self,
        inputs: dict[str, Any],
        *,
        labels: Tensor | None = None,
        rows: Rows = "all",
        draft: int = 0,
    ) -> DecoderOutput:
        """Return hidden states for the inputs of a forward.

        A cache that was filled under another schedule of the model goes on under that one.

        Args:
            labels: int64 [B, L]; the supervised columns choose the score's queries in training.
            rows: columns to return: "all", each row's "last", or those of the "text" stream.
            draft: tokens behind the prompt that an assistant proposed.

        Raises:
            InputError: the inputs do not go together. CacheError: the cache is not one of this model.
        """
        owner = self._in_charge(inputs.get("past_key_values"))
        if owner is not self:
            return owner.call(inputs, labels=labels, rows=rows, draft=draft)
        check_surroundings()
        scheduled = self.scheduled
        with _outside_inference_mode():
            cache = self._cache(inputs, labels)
            with nullcontext() if cache is None else cache.transaction():
                prepared = self._prepare(scheduled, inputs, cache, labels, rows, draft)
                with self._attention_kernels(prepared):
                    outputs = execute(prepared, self.graphs)
                for listener in self.on_outputs:
                    listener(prepared, outputs)
                output = decoder_output(prepared, outputs)
        if prepared.kind == "prefill" and cache is not None:
            self.last_cache_bytes = cache.nbytes
        return output

    def _in_charge(self, cache: Any) -> "Runtime":
        """Return the runtime whose schedule the prompt of a cache ran under; this one if there is no prompt."""
        if len(self.peers) == 1 or not isinstance(cache, HidropCache):
            return self
        if cache.get_seq_length() == 0 or self._filled(cache):
            return self
        for peer in self.peers:
            if peer._filled(cache):
                self.log_once(
                    f"a cache whose prompt ran under the schedule {peer.schedule} goes on under it, not under "
                    f"{self.schedule}: its layers hold the tokens of the first"
                )
                return peer
        return self

    def _filled(self, cache: HidropCache) -> bool:
        if cache.origin is None:  # it was pickled
            return cache.plan == self.plan
        return self.programs.fills(cache.origin)

    def _attention_kernels(self, prepared: PreparedCall) -> AbstractContextManager[None]:
        recorded = prepared.recorded and self.graphs is not None
        cudnn = recorded and self.options.attention == "cudnn"
        device = next(iter(prepared.tensors.values())).device
        return attention_kernels(device, cudnn=cudnn)

    def prepare(
        self,
        inputs: dict[str, Any],
        *,
        labels: Tensor | None = None,
        rows: Rows = "all",
        draft: int = 0,
    ) -> PreparedCall:
        """Return everything that a call needs before the decoder runs; arguments as for `call`.

        A cache that is given has room for the call's tokens afterwards, and counts them as there.
        """
        owner = self._in_charge(inputs.get("past_key_values"))
        scheduled = owner.scheduled
        cache = owner._cache(inputs, labels)
        return owner._prepare(scheduled, inputs, cache, labels, rows, draft)

    def _prepare(
        self,
        scheduled: ScheduledModel,
        inputs: dict[str, Any],
        cache: HidropCache | None,
        labels: Tensor | None,
        rows: Rows,
        draft: int,
    ) -> PreparedCall:
        placement = self.programs.store.placement
        if placement is not None and inputs.get("inputs_embeds") is not None:
            inputs = inputs | {"inputs_embeds": inputs["inputs_embeds"].to(placement.entry)}
        if cache is not None and cache.get_seq_length() > 0:
            multiple = None if self.graphs is None else self.options.bucket_multiple
            if scheduled.has_images(inputs):
                prepared = prepare_turn(
                    scheduled, self.programs, inputs, cache, labels, rows, draft
                )
                self.last_layout, self.last_cache_bytes = prepared.layout, None
                return prepared
            return prepare_decode(scheduled, self.programs, inputs, cache, rows, multiple)
        kind: Kind = "train" if cache is None else "prefill"
        follow_division(self, scheduled)
        capture = self.programs.capture()
        follow_capture(self, capture)
        multiple = None if self.graphs is None else self.options.bucket_multiple
        context = prompt_context(
            scheduled,
            inputs,
            labels,
            rules=capture.rules,
            kind=kind,
            rows=rows,
            draft=draft,
            multiple=multiple,
            overlap=kind == "prefill" and self.overlaps_vision,
            copies=1 if cache is None else cache.copies,
            together=capture.decoder.sharded or _trains_together(self.model),
        )
        self.last_layout, self.last_cache_bytes = context.layout, None
        recompute = kind == "train" and _checkpoints_layers(self.model)
        if recompute and self.graphs is not None:
            self.log_once("gradient checkpointing is on: training runs without CUDA graphs")
        return prepare_prompt(context, self.programs, capture, cache, recompute=recompute)

    @cached_property
    def division(self) -> Division | None:
        """How tensor parallelism divides the decoder; None where it is whole."""
        return Division.of(self.model)

    def _cache(self, inputs: dict[str, Any], labels: Tensor | None) -> HidropCache | None:
        """Check a call, and return the cache that it goes on with or fills, None if there is to be none."""
        if labels is None and self.model.training and torch.is_grad_enabled():
            self._note_missing_labels()
        cache = inputs.get("past_key_values")
        if cache is None and self._wants_cache(inputs, labels):
            cache = HidropCache()
        if cache is None:
            return None
        if not isinstance(cache, HidropCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; a compiled model keeps another number "
                "of tokens in every layer and takes only the cache that its own forward or generate "
                "returned. Pass None, or call hidrop.restore(model) first"
            )
        if cache.get_seq_length() == 0:
            cache.pool = cache.pool if self.graphs is None else self.graphs.pool
        elif cache.origin is None:
            self._adopt(cache)
        return cache

    def _adopt(self, cache: HidropCache) -> None:
        """Go on with a cache that was pickled under this plan."""
        capture = self.programs.capture()
        shapes = [layer.shape for layer in cache.layers]
        if cache.plan != self.plan or shapes != capture.kv_shapes:
            raise CacheError(
                "past_key_values was pickled under another schedule, or is another model's; pass the "
                "whole text with past_key_values=None"
            )
        cache.origin = capture
        cache.pool = None if self.graphs is None else self.graphs.pool

    def _note_missing_labels(self) -> None:
        if self.schedule.prune or self.schedule.exit is not None:
            self.log_once(
                "training without labels (a loss of its own, label smoothing, compute_loss_func?): the "
                "last token of each row scores its vision tokens, and a dropped token has zero logits, "
                "also where it predicts the word behind an image. Pass labels to forward; a loss of "
                "your own goes into model.loss_function",
                logging.WARNING,
            )

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

    def evict_recordings(self) -> None:
        """Drop the recordings of executables that are gone with their capture, or with their schedule."""
        if self.graphs is not None:
            self.graphs.keep_only(self.programs.store.executables())


def _checkpoints_layers(model: Any) -> bool:
    """Return True if `gradient_checkpointing_enable()` is in force, or torch's wrappers recompute layers."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    modules = text_decoder(model).modules()
    return any(getattr(m, "gradient_checkpointing", False) or recomputes(m) for m in modules)


def _trains_together(model: Any) -> bool:
    """Return True where the order of gradients in this call must be that of other processes."""
    return torch.is_grad_enabled() and buckets_gradients(model)


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, whose tensors are of a kind that nothing compiled or recorded outside takes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
