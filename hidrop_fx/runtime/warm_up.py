"""Compile and record ahead of the first request.

hidrop.warmup(model, [hidrop.Shape(batch=b, text=64, images=1, new_tokens=128) for b in (1, 8)])
hidrop.warmup(model, [lambda: model.generate(**inputs, prompt_lookup_num_tokens=3)])
"""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hidrop_fx.capture.layers import base_of, embedding_table, text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.errors import InputError
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.models import family_of
from hidrop_fx.models.encoding import KnownFeatures
from hidrop_fx.models.kept_cells import blank_images
from hidrop_fx.planning.geometry import vision_tokens_per_image
from hidrop_fx.runtime.before_tower import every_cell
from hidrop_fx.runtime.hf.binding import require_runtime
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.vision import overlap_lengths
from hidrop_fx.schedule.keeps import checked_int
from hidrop_fx.surroundings import random_state_kept

logger = logging.getLogger("hidrop_fx")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One kind of `generate` call: so many rows, and the longest of them.

    Attributes:
        batch: rows, beams and returned sequences counted in (not beside an overlapped tower, which several rows
            of one image do not use: give such a call as a function).
        text: text tokens of a row.
        images: images of a row.
        image_tokens: vision tokens of an image; None takes what this model makes of every image. Where a classifier decides
            how many reach the decoder (`index-preserving`): those that do.
        new_tokens: tokens to be generated.
    """

    batch: int = 1
    text: int = 64
    images: int = 1
    image_tokens: int | None = None
    new_tokens: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("batch", 1), ("text", 2), ("images", 0), ("new_tokens", 0)):
            checked_int(getattr(self, name), name, minimum=minimum)
        if self.image_tokens is not None:
            checked_int(self.image_tokens, "image_tokens", minimum=1)


# Passes over the shapes: the first may end with larger KV buffers than it began with.
_PASSES = 3

Call = Callable[[], object]


def warmup(
    model: Any, shapes: Iterable[Shape | Call], *, progress: bool = True
) -> list[CompileEntry]:
    """Make what `generate` calls of these shapes need, so that none of them waits for a compiler.

    Runs the model on made-up inputs without gradients. A length stands for all that round up to
    the same multiple where graphs are recorded, and for every length where they are not: there, the
    batch being one or larger is all that matters, and whether a prompt is longer than a sliding window.

    Shapes tell of plain `generate`: one prompt, then a token at a time. Give an example of other calls as
    a function, and whatever it does is made: several tokens behind a prompt (a second turn, prompt
    lookup, an assistant), autocast, hidden states, the logits of all rows, an image as the last
    thing of a prompt, a prompt padded to a multiple of its own.

    Args:
        model: a compiled model.
        shapes: what to expect; functions without arguments are called.
        progress: show a bar on a terminal.

    Returns:
        What was compiled and recorded, with seconds.

    Raises:
        HidropError: the model is not compiled. InputError: `shapes` is no list of shapes and
            functions, or `image_tokens` is needed, or another than every image has.
    """
    runtime = require_runtime(model, "call hidrop_fx.compile first")
    wanted = sorted(_checked(shapes), key=lambda shape: _size(runtime.model, shape), reverse=True)
    known = len(runtime.programs.log.entries)
    quiet = not (progress and sys.stderr.isatty())
    graphs = runtime.graphs
    with runtime.programs.shape_policy.announced(), random_state_kept():
        for _ in range(_PASSES):
            lost = 0 if graphs is None else graphs.moved
            for shape in tqdm(wanted, desc="warm-up", unit="shape", disable=quiet):
                _run(runtime, shape)
            if graphs is None or graphs.moved == lost:
                break
    if graphs is not None and len(graphs.entries) == graphs.capacity:
        logger.warning(
            "as many graphs are recorded as are kept, max_graphs=%d; the first may be gone already",
            graphs.capacity,
        )
    return runtime.programs.log.entries[known:]


def _checked(shapes: Any) -> list[Shape | Call]:
    if isinstance(shapes, Iterable) and not isinstance(shapes, str):
        found = list(shapes)
        wrong = [shape for shape in found if not (isinstance(shape, Shape) or callable(shape))]
    else:
        found, wrong = [], [shapes]
    if wrong:
        raise InputError(
            f"shapes has {wrong[0]!r}; give a list, [hidrop_fx.Shape(batch=1, text=64, new_tokens=32)]"
        )
    return found


def _run(runtime: Runtime, shape: Shape | Call) -> None:
    if not isinstance(shape, Shape):
        shape()
        return
    full = torch.ones(shape.batch, _length(runtime.model, shape), dtype=torch.int64, device="cpu")
    _generate(runtime, shape, full)
    if shape.batch > 1 and runtime.graphs is None:  # a mask of its own kind in decode
        ragged = full.clone()
        ragged[0, 0] = 0
        _generate(runtime, shape, ragged)


@torch.no_grad()
def _generate(runtime: Runtime, shape: Shape, mask: Tensor) -> None:
    """Run a prompt, and a token at each length that decode tells apart."""
    inputs = _prompt(runtime, shape)
    device = inputs["input_ids"].device
    mask = mask.to(device)
    cache = HidropCache(max_length=mask.shape[1] + shape.new_tokens + 1)
    with every_cell():
        runtime.call({**inputs, "attention_mask": mask, "past_key_values": cache}, rows="last")
    step = runtime.options.bucket_multiple if runtime.graphs is not None else shape.new_tokens
    token = inputs["input_ids"][:, -1:]
    for done in range(0, shape.new_tokens, max(1, step)):
        runtime.call({"input_ids": token, "past_key_values": cache})
        ahead = min(step, shape.new_tokens - done) - 1
        if ahead > 0:
            with cache.turn():
                cache.extend(None, ahead)


def _prompt(runtime: Runtime, shape: Shape) -> dict[str, Any]:
    decoder = text_decoder(runtime.model)
    embedding, device = embedding_table(decoder), home(decoder)
    family = family_of(runtime.model)
    placeholder = family.tokens(runtime.model.config)[0]
    count = shape.images * _image_tokens(runtime.model, shape)
    word = 0 if placeholder != 0 else 1
    row = [word, *[placeholder] * count, *[word] * (shape.text - 1)]
    prompt: dict[str, Any] = {
        "input_ids": torch.tensor([row], device=device).repeat(shape.batch, 1)
    }
    if family.blocks is not None:
        is_image = prompt["input_ids"] == placeholder
        prompt[family.blocks.argument] = is_image * family.blocks.vision
    reduction = runtime.schedule.reduction
    reads_tower = reduction is not None and reduction.reducer.reads_tower
    pixels = _pixels(runtime, shape) if reads_tower or runtime.overlaps_vision else None
    if count and runtime.schedule.decides_by_pixels:
        tokens, base = _image_tokens(runtime.model, shape), base_of(runtime.model)
        prompt |= blank_images(base, shape.images * shape.batch, tokens)
    elif pixels is not None and (
        reads_tower or overlap_lengths(runtime.model, {"pixel_values": pixels}) is not None
    ):
        prompt["pixel_values"] = pixels
    elif count:
        size = _image_tokens(runtime.model, shape), embedding.shape[1]
        image = embedding.new_zeros(size, device=device)
        encoded = KnownFeatures([image] * (shape.images * shape.batch))
        if family.deepstack is not None:
            config = runtime.model.config
            encoded.deepstack_features = family.deepstack.repeated(config, encoded.pooler_output)
        prompt["mm_encoder_outputs"] = {"image": encoded}
    return prompt


def _pixels(runtime: Runtime, shape: Shape) -> Tensor | None:
    """Make black images, where the vision tower takes them in one size."""
    vision = runtime.model.config.vision_config
    size = getattr(vision, "image_size", None)  # Qwen's towers take any
    if not (shape.images and isinstance(size, int)):
        return None
    count = shape.batch * shape.images
    channels = getattr(vision, "num_channels", 3)
    return torch.zeros(
        count,
        channels,
        size,
        size,
        dtype=runtime.model.dtype,
        device=home(text_decoder(runtime.model)),
    )


def _image_tokens(model: Any, shape: Shape) -> int:
    fixed = vision_tokens_per_image(model)
    if None not in (fixed, shape.image_tokens) and fixed != shape.image_tokens:
        raise InputError(
            f"{shape}: every image of this model has {fixed} tokens; leave image_tokens out"
        )
    found = shape.image_tokens or fixed
    if found is None and shape.images:
        raise InputError(
            f"{shape}: images of this model vary in their number of tokens; pass image_tokens=..."
        )
    return found or 0


def _length(model: Any, shape: Shape) -> int:
    return shape.text + shape.images * _image_tokens(model, shape)


def _size(model: Any, shape: Shape | Call) -> int:
    if not isinstance(shape, Shape):
        return 0  # after all that tell their size
    return shape.batch * (_length(model, shape) + shape.new_tokens)
