"""What runs in place of a compiled model's forward: prefill, decode, and the programs for them.

    states = runtime.run(inputs)      # hidden states, cache, image features
    logits = lm_head(states.hidden)

A `Runtime` belongs to one model. It captures the decoder at the first call, and again only when the
decoder's `fingerprint` changed.
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
from hidrop_fx.models import Family, backbone_of, family_of
from hidrop_fx.passes.kv_cache import mask_name
from hidrop_fx.pipeline import Output, build_program
from hidrop_fx.planning import Plan
from hidrop_fx.program import Kind
from hidrop_fx.regions import find_regions
from hidrop_fx.runtime.cache import HidropCache
from hidrop_fx.schedule import Schedule

logger = logging.getLogger("hidrop_fx")

# Train and eval mode, adapters on and off alternate; older states of the model are let go, with their parameters.
_CAPTURES = 4

_PLAIN = (bool, int, float, str)
# Where PEFT keeps which adapters act, and how strongly.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")

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


@dataclass(kw_only=True, eq=False)
class Capture:
    """A captured decoder and the executables made from it."""

    decoder: CapturedDecoder
    windows: dict[str, int]
    """Sliding window of each captured mask that has one."""
    kv_shapes: list[tuple[int, int]]
    """KV heads and head width of each layer."""
    executables: dict[_ProgramKey, Executable] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """A copied cache, e.g. of a shared prefix, goes on with the programs that filled it."""
        return self


class Runtime:
    """The compiled side of one model."""

    def __init__(self, model: Any, schedule: Schedule, plan: Plan, options: Options) -> None:
        self.model = model
        self.schedule = schedule
        self.plan = plan
        self.options = options
        self._reset()

    def _reset(self) -> None:
        self.captures: dict[Any, Capture] = {}
        self.bodies: dict[str, Body] = {}
        self.log = CompileLog()
        self.last_layout: Layout | None = None
        self.last_cache_bytes: int | None = None
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
            if labels is not None:
                raise InputError(
                    "labels came with a cache that holds a prompt; train on the whole text, with "
                    "past_key_values=None"
                )
            return self._decode(inputs, cache)
        if cache is None and self._wants_cache(inputs, labels):
            cache = HidropCache()
        try:
            return self._prefill(inputs, cache, labels, last_only)
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
            table = window_table(layout.columns, capture.windows[name])
            tensors[f"column_{name}"] = table.expand(len(placeholder), 1, -1, -1).to(device)
        kind: Kind = "train" if cache is None else "prefill"
        run = self.executable(capture, kind, "chosen" if last_only else "all", masks)
        if cache is not None:
            cache.origin = capture
            cache.prompt_mask = _valid(inputs.get("attention_mask"), placeholder).to(device)
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
        if _has_images(inputs, self.family.pixels):
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
        capture = cache.origin
        if capture not in self.captures.values():
            raise CacheError(
                "past_key_values was filled under another schedule, or before the model changed; pass "
                "the whole text with past_key_values=None"
            )
        tokens = embeds.shape[1]
        valid = self._past_and_new(inputs, cache, tokens)
        ids_before = dict(cache.next_ids)
        columns = cache.extend(valid, tokens)
        windows = [w for w in capture.windows.values() if cache.get_seq_length() > w]
        masked = cache.ragged or bool(windows) or tokens > 1
        run = self.executable(capture, "decode", "all", (), masked)
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
            for window in (None, *cache.origin.windows.values()):
                mask = mask_name(name, window)
                if mask in wanted:
                    tensors[mask] = visible(known, columns, window)
        return tensors

    def _past_and_new(
        self, inputs: dict[str, Any], cache: HidropCache, tokens: int
    ) -> Tensor | None:
        """Hold the mask and position ids of a decode call against the cache.

        Returns:
            Which of the new tokens are real, bool [B, tokens]; None if all are.
        """
        mask = inputs.get("attention_mask")
        new = None
        if mask is not None:
            expected = (cache.batch_size, cache.get_seq_length() + tokens)
            if tuple(mask.shape) != expected:
                raise InputError(
                    f"attention_mask has shape {tuple(mask.shape)}; with this cache it must cover "
                    f"the past and the new tokens, {expected}"
                )
            mask = mask.to(cache.next_column.device).bool()
            cache.hide(mask[:, :-tokens])
            new = None if bool(mask[:, -tokens:].all()) else mask[:, -tokens:]
        ids = inputs.get("position_ids")
        if ids is not None and new is None and self.schedule.positions != "group":
            self._check_positions(ids, cache, tokens)
        return new

    def _check_positions(self, ids: Tensor, cache: HidropCache, tokens: int) -> None:
        if cache.prompt_mask is None or not bool(cache.prompt_mask[:, -1].all()):
            return  # behind padding on the right, transformers counts from the padding
        expected = cache.next_ids["text"][:, None] + torch.arange(tokens, device=ids.device)
        if not torch.equal(ids.expand_as(expected), expected):
            raise InputError(
                f"position_ids {ids.tolist()} do not continue the cache, whose next are "
                f"{expected.tolist()}; leave position_ids out"
            )

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
        mask = inputs.get("attention_mask")
        if ids is None:
            ids = torch.arange(placeholder.shape[1])[None]
        elif mask is None and inputs.get("past_key_values") is None and _is_packed(ids):
            raise InputError(
                "position_ids start anew within a row and there is no attention_mask: these are "
                "packed sequences, which a compiled model cannot keep apart; pad them instead"
            )
        ids = ids.cpu().expand(placeholder.shape)
        valid = _valid(mask, placeholder)
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

    def capture(self) -> Capture:
        """The capture of the decoder as it is now."""
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
        hooked = [name for name, module in self.decoder.named_modules() if _user_hooks(module)]
        if hooked:
            logger.warning(
                "hooks on %s of the decoder do not run in a compiled model; what they changed while "
                "it was captured stays",
                ", ".join(hooked[:3]),
            )
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
        self,
        capture: Capture,
        kind: Kind,
        output: Output,
        masks: tuple[str, ...] = (),
        masked: bool = False,
    ) -> Executable:
        """The program for a purpose, made at first use."""
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
    """What a captured graph depends on: modules, parameters and buffers as objects, and the plain
    values that their code reads (mode, dropout, scale, which adapter is active).
    """
    key: list[Any] = []
    for module in decoder.modules():
        values = module.__dict__
        key.append(id(module))
        key += [value for value in values.values() if type(value) in _PLAIN]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                key += (id(tensor), tensor.dtype, tensor.device)
        if module._forward_hooks or module._forward_pre_hooks:
            key += _user_hooks(module)
        if any(name in values for name in _ADAPTER_STATE):
            key += [repr(values.get(name)) for name in _ADAPTER_STATE]
    return tuple(key)


def _user_hooks(module: nn.Module) -> tuple[int, ...]:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = "transformers.utils.output_capturing"
    return tuple(id(hook) for hook in hooks if getattr(hook, "__module__", "") != ours)


def _is_packed(position_ids: Tensor) -> bool:
    return bool((position_ids.diff(dim=-1) != 1).any())


def scatter_rows(hidden: Tensor, columns: Tensor, length: int) -> Tensor:
    """Rows [B, S, D] back at their columns -> [B, L, D], zero elsewhere."""
    full = hidden.new_zeros(len(hidden), length + 1, hidden.shape[2])
    index = columns[:, :, None].expand(-1, -1, hidden.shape[2])
    return full.scatter(1, index, hidden)[:, :length]


def window_table(length: int, window: int) -> Tensor:
    """A sliding-window mask over the columns of a prompt and the sentinel, bool [L + 1, L + 1].

    As in transformers' `sliding_window_overlay`: a query sees the `window` columns that end at its own.
    """
    columns = torch.arange(length + 1)
    distance = columns[:, None] - columns[None, :]
    return (distance >= 0) & (distance < window)


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


def _has_images(inputs: dict[str, Any], pixels: str) -> bool:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return encoded is not None or inputs.get(pixels) is not None
