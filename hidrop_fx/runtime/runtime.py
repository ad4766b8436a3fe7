"""What runs in place of a compiled model's forward: prefill, decode, and the programs for them.

    states = runtime.run(inputs)      # hidden states, cache, image features
    logits = lm_head(states.hidden)

A `Runtime` belongs to one model. It captures the decoder at the first call, and again only when the
model's structure, dtype, device or train/eval mode changed.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture import CapturedDecoder, capture
from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.layout import IGNORE, Layout, count_images, lay_out
from hidrop_fx.lowering import Body, CompileLog, Executable, lower
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.passes.kv_cache import mask_name
from hidrop_fx.pipeline import Output, build_program
from hidrop_fx.planning import Plan
from hidrop_fx.program import Kind
from hidrop_fx.regions import find_regions
from hidrop_fx.runtime.cache import HidropCache
from hidrop_fx.schedule import Schedule

logger = logging.getLogger("hidrop_fx")

# Train and eval mode alternate; older states of the model are let go, with their parameters.
_CAPTURES = 2

_ProgramKey = tuple[Kind, Output, tuple[str, ...], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model was compiled, beside its schedule."""

    backend: str = "inductor"
    lowering: str | None = None
    """"bodies" or "whole"; None for what measured best: bodies for prefill, whole for decode."""


@dataclass(kw_only=True)
class States:
    """What one call of the decoder gives."""

    hidden: Tensor
    """[B, L, D], zero where no token came through; [B, 1, D] where only the last row was wanted."""
    cache: HidropCache | None
    features: Tensor | None


@dataclass(kw_only=True)
class Capture:
    """A captured decoder and the executables made from it."""

    decoder: CapturedDecoder
    windows: dict[str, int]
    """Sliding window of each captured mask that has one."""
    kv_shapes: list[tuple[int, int]]
    """KV heads and head width of each layer."""
    executables: dict[_ProgramKey, Executable] = field(default_factory=dict)


class Runtime:
    """The compiled side of one model."""

    def __init__(self, model: Any, schedule: Schedule, plan: Plan, options: Options) -> None:
        self.model = model
        self.schedule = schedule
        self.plan = plan
        self.options = options
        self.family = family_of(model)
        self._reset()

    def _reset(self) -> None:
        self.captures: dict[Any, Capture] = {}
        self.bodies: dict[str, Body] = {}
        self.log = CompileLog()
        self.last_layout: Layout | None = None
        self.last_cache_bytes: int | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "schedule", "plan", "options", "family")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.model

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    # One call.

    def run(
        self, inputs: dict[str, Any], *, labels: Tensor | None = None, last_only: bool = False
    ) -> States:
        """Hidden states for the inputs of a forward."""
        self._refuse(inputs)
        cache = inputs.get("past_key_values")
        if cache is not None and not isinstance(cache, HidropCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; a compiled model keeps another number "
                "of tokens in every layer and takes only the cache that its own forward or generate "
                "returned. Pass None, or call hidrop.restore(model) first"
            )
        if cache is not None and cache.get_seq_length() > 0:
            return self._decode(inputs, cache)
        if cache is None and self._wants_cache(inputs, labels):
            cache = HidropCache()
        return self._prefill(inputs, cache, labels, last_only)

    def _refuse(self, inputs: dict[str, Any]) -> None:
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise InputError("pass exactly one of input_ids and inputs_embeds")
        configs = (self.model.config, self.model.config.get_text_config())
        for name in ("output_attentions", "output_hidden_states"):
            wanted = inputs.get(name)
            if wanted is None:
                wanted = any(getattr(config, name, False) for config in configs)
            if wanted:
                raise InputError(
                    f"{name}=True is not available: the layers of a compiled model see different "
                    "tokens, and its attention is fused. Call hidrop.restore(model) to look inside "
                    "the original"
                )

    def _wants_cache(self, inputs: dict[str, Any], labels: Tensor | None) -> bool:
        wanted = inputs.get("use_cache")
        if wanted is None:
            default = getattr(self.model.config.get_text_config(), "use_cache", True)
            return bool(default) and not self.model.training and labels is None
        return bool(wanted)

    def _prefill(
        self,
        inputs: dict[str, Any],
        cache: HidropCache | None,
        labels: Tensor | None,
        last_only: bool,
    ) -> States:
        capture = self.capture()
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        placeholder = self._placeholders(ids, embeds)
        images = self._features(inputs)
        layout = self._lay_out(inputs, placeholder, images, labels)
        self.last_layout = layout
        self.last_cache_bytes = None
        device = self.decoder.get_input_embeddings().weight.device
        tensors = {name: t.to(device) for name, t in layout.inputs.items()}
        tensors |= self._embeddings(ids, embeds, images, placeholder, layout, tensors)

        masks = self._masks_needed(capture, layout.columns)
        for name in masks:
            valid = _valid(inputs.get("attention_mask"), placeholder)
            tensors[f"column_{name}"] = window_table(valid, capture.windows[name]).to(device)
        kind: Kind = "train" if cache is None else "prefill"
        run = self.executable(kind, "chosen" if last_only else "all", masks)
        if cache is not None:
            streams = [run.program.stream_of(r.layer).name for r in run.program.regions]
            like = tensors["text_embeds"]
            tensors |= cache.allocate(layout, streams, capture.kv_shapes, like)
        outputs = run(tensors)
        if cache is not None:
            cache.note_columns(
                {k.removeprefix("columns_"): v for k, v in outputs.items() if k != "hidden"}
            )
            self.last_cache_bytes = cache.nbytes
        hidden = outputs["hidden"]
        if not last_only:
            last_stream = run.program.streams[-1].name
            hidden = scatter_rows(hidden, outputs[f"columns_{last_stream}"], layout.columns)
        return States(hidden=hidden, cache=cache, features=torch.cat(images) if images else None)

    def _decode(self, inputs: dict[str, Any], cache: HidropCache) -> States:
        if _has_images(inputs, self.family.image_inputs[:1]):
            raise InputError(
                "images came with a cache that holds a prompt already; vision tokens are chosen for "
                "the whole prompt, so pass the full conversation with past_key_values=None. "
                "(generate does this where prefill_chunk_size is set: leave it unset)"
            )
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self.decoder.get_input_embeddings()(ids)
        if len(embeds) != cache.batch_size:
            raise InputError(
                f"the call has {len(embeds)} rows, its cache {cache.batch_size}; bring the cache to the "
                "batch with batch_repeat_interleave or batch_select_indices"
            )
        capture = self.capture(recheck=False)
        tokens = embeds.shape[1]
        valid = _new_tokens(inputs.get("attention_mask"), tokens)
        ids_before = dict(cache.next_ids)
        columns = cache.extend(valid, tokens)
        windows = [w for w in capture.windows.values() if cache.get_seq_length() > w]
        masked = cache.ragged or bool(windows) or tokens > 1
        run = self.executable("decode", "all", (), masked)
        with torch.no_grad():
            tensors = self._decode_inputs(run, cache, ids_before, embeds, columns, valid)
            hidden = run(tensors)["hidden"]
        return States(hidden=hidden, cache=cache, features=None)

    def _decode_inputs(
        self,
        run: Executable,
        cache: HidropCache,
        ids_before: dict[str, Tensor],
        embeds: Tensor,
        columns: Tensor,
        valid: Tensor | None,
    ) -> dict[str, Tensor]:
        tokens = embeds.shape[1]
        steps = torch.arange(tokens, device=embeds.device)[None]
        if valid is not None:
            steps = (valid.cumsum(dim=1) - 1).clamp(min=0)
        tensors = {"inputs_embeds": embeds, **cache.views()}
        wanted = set(run.inputs)
        first = run.program.streams[0].name
        tensors["position_ids"] = ids_before[first][:, None] + steps
        for name, known in cache.columns.items():
            if f"slots_{name}" not in wanted:
                continue
            filled = known.shape[1]
            tensors[f"slots_{name}"] = torch.arange(filled - tokens, filled, device=embeds.device)
            if f"position_ids_{name}" in wanted:
                tensors[f"position_ids_{name}"] = ids_before[name][:, None] + steps
            for window in (None, *self.capture(recheck=False).windows.values()):
                mask = mask_name(name, window)
                if mask in wanted:
                    tensors[mask] = visible(known, columns, window)
        return tensors

    # What a prefill is made of.

    def _placeholders(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        token = self.family.placeholder(self.model.config)
        if ids is not None:
            return (ids == token).cpu()
        embedding = self.decoder.get_input_embeddings()
        vector = embedding(torch.tensor(token, device=embedding.weight.device))
        assert embeds is not None
        return (embeds == vector).all(dim=-1).cpu()

    def _features(self, inputs: dict[str, Any]) -> list[Tensor]:
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            if inputs.get("pixel_values") is not None:
                raise InputError("pass either pixel_values or mm_encoder_outputs, not both")
            return list(encoded.pooler_output)
        if inputs.get("pixel_values") is None:
            return []
        return self.family.encode_images(self.base, inputs)

    def _lay_out(
        self,
        inputs: dict[str, Any],
        placeholder: Tensor,
        images: list[Tensor],
        labels: Tensor | None,
    ) -> Layout:
        if not images and placeholder.any():
            row = int(placeholder.any(dim=1).nonzero()[0])
            raise InputError(
                f"row {row} has {int(placeholder[row].sum())} image placeholder tokens but the call "
                "has no images; pass pixel_values (the processor makes them from images=...)"
            )
        counts = count_images(placeholder, [len(image) for image in images])
        ids = inputs.get("position_ids")
        if ids is None:
            ids = torch.arange(placeholder.shape[1])[None]
        ids = ids.cpu().expand(placeholder.shape)
        valid = _valid(inputs.get("attention_mask"), placeholder)
        if labels is not None and labels.shape != placeholder.shape:
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, input_ids {tuple(placeholder.shape)}"
            )
        if labels is not None and bool(((labels.cpu() != IGNORE) & ~valid).any()):
            raise InputError(
                f"labels supervise padding; set them to {IGNORE} where attention_mask is 0"
            )
        return lay_out(
            self.schedule,
            self.plan.geometry.num_layers,
            valid=valid,
            placeholder=placeholder,
            position_ids=ids,
            images=counts,
            labels=None if labels is None else labels.cpu(),
        )

    def _embeddings(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        images: list[Tensor],
        placeholder: Tensor,
        layout: Layout,
        tensors: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        embedding = self.decoder.get_input_embeddings()
        columns = tensors["text_columns"]
        if embeds is None:
            assert ids is not None
            padded = nn.functional.pad(ids, (0, 1))
            text = embedding(padded.to(columns.device).gather(1, columns))
        else:
            padded = nn.functional.pad(embeds, (0, 0, 0, 1))
            text = padded.gather(1, columns[:, :, None].expand(-1, -1, embeds.shape[2]))
        if not images:
            return {"text_embeds": text, "vision_embeds": text[:, :0]}
        features = torch.cat(images).to(text.device, text.dtype)
        # Features come in the order of their places, row after row; the sentinel takes any.
        order = placeholder.flatten().cumsum(0).sub(1).clamp(min=0).view_as(placeholder)
        order = nn.functional.pad(order, (0, 1)).to(text.device)
        vision = features[order.gather(1, tensors["vision_columns"])]
        if layout.needs_features:
            places = nn.functional.pad(placeholder, (0, 1)).to(text.device).gather(1, columns)
            text = torch.where(places[:, :, None], features[order.gather(1, columns)], text)
        return {"text_embeds": text, "vision_embeds": vision}

    def _masks_needed(self, capture: Capture, columns: int) -> tuple[str, ...]:
        return tuple(name for name, window in capture.windows.items() if columns > window)

    # Programs.

    def capture(self, *, recheck: bool = True) -> Capture:
        """The capture of the decoder as it is now."""
        if not recheck and self.captures:
            return next(reversed(self.captures.values()))
        key = fingerprint(self.decoder)
        with self._lock:
            if key in self.captures:
                found = self.captures.pop(key)
            else:
                if self.captures:
                    logger.info("the model changed since it was captured; capturing it again")
                found = self._new_capture()
            self.captures[key] = found
            while len(self.captures) > _CAPTURES:
                self.captures.pop(next(iter(self.captures)))
            return found

    def _new_capture(self) -> Capture:
        types = backbone_of(self.model).layer_types(self.model.config.get_text_config())
        decoder = capture(self.decoder, layer_types=types)
        windows: dict[str, int] = {}
        shapes = []
        for region in find_regions(decoder.module.graph, decoder.layers, decoder.num_layers):
            _, _, value, mask, _, _, window = region.attention.args
            shape = value.meta["val"].shape  # type: ignore[union-attr]
            shapes.append((int(shape[1]), int(shape[3])))
            if window is not None:
                windows[str(mask)] = window  # type: ignore[assignment]
        return Capture(decoder=decoder, windows=windows, kv_shapes=shapes)

    def executable(
        self, kind: Kind, output: Output, masks: tuple[str, ...] = (), masked: bool = False
    ) -> Executable:
        """The program for a purpose, made at first use."""
        capture = self.capture(recheck=False)
        key = (kind, output, masks, masked)
        with self._lock:
            if key not in capture.executables:
                started = time.perf_counter()
                program = build_program(
                    capture.decoder, self.plan, kind, output=output, masks=masks, masked=masked
                )
                capture.executables[key] = lower(
                    program,
                    backend=self.options.backend,
                    lowering=self._lowering(kind),
                    log=self.log,
                    shared=self.bodies,
                )
                seconds = time.perf_counter() - started
                logger.info("made the %s program in %.1f s", kind, seconds)
            return capture.executables[key]

    def _lowering(self, kind: Kind) -> str:
        if self.options.lowering is not None:
            return self.options.lowering
        return "whole" if kind == "decode" else "bodies"


def fingerprint(decoder: nn.Module) -> Any:
    """What a captured graph depends on: modules and parameters as objects, dtype, device, mode."""
    modules = tuple(map(id, decoder.modules()))
    parameters = tuple((id(p), p.dtype, p.device) for p in decoder.parameters())
    return decoder.training, modules, parameters


def scatter_rows(hidden: Tensor, columns: Tensor, length: int) -> Tensor:
    """Rows [B, S, D] back at their columns -> [B, L, D], zero elsewhere."""
    full = hidden.new_zeros(len(hidden), length + 1, hidden.shape[2])
    index = columns[:, :, None].expand(-1, -1, hidden.shape[2])
    return full.scatter(1, index, hidden)[:, :length]


def window_table(valid: Tensor, window: int) -> Tensor:
    """A sliding-window mask over columns, bool [B, 1, L + 1, L + 1].

    As in transformers' `sliding_window_overlay`: a query sees the `window` columns that end at its own.
    """
    columns = torch.arange(valid.shape[1] + 1)
    distance = columns[:, None] - columns[None, :]
    band = (distance >= 0) & (distance < window)
    return band.expand(len(valid), 1, -1, -1)


def visible(known: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which cached tokens [B, filled] the new ones [B, q] see: bool [B, 1, q, filled]."""
    # The sentinel's column is the largest number: later than every query, hence unseen.
    mask = known[:, None, :] <= columns[:, :, None]
    if window is not None:
        mask &= known[:, None, :] > columns[:, :, None] - window
    return mask[:, None]


def _valid(attention_mask: Tensor | None, placeholder: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(placeholder)
    if attention_mask.shape != placeholder.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a compiled model takes the "
            f"2-D mask of its input_ids, {tuple(placeholder.shape)}, true or 1 for real tokens"
        )
    return attention_mask.cpu().bool()


def _new_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of several new tokens a row are real; None if all are."""
    if attention_mask is None or tokens == 1 or attention_mask.dim() != 2:
        return None
    valid = attention_mask[:, -tokens:].bool()
    return None if bool(valid.all()) else valid


def _has_images(inputs: dict[str, Any], names: tuple[str, ...]) -> bool:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return encoded is not None or any(inputs.get(name) is not None for name in names)
