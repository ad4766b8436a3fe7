"""Padded batches with images and videos, and what each row is made of, for a reference of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tests.support.families.case import IMAGE_TOKEN, PAD, VIDEO_TOKEN, Case

IMAGE, VIDEO = "<image>", "<video>"
Row = Sequence[int | str]
ROWS: list[Row] = [[5, IMAGE, 6, 7], [8, IMAGE, 9, 10, IMAGE, 11, 12], [13, 14, 15]]
"""One image, two, none."""


@dataclass(frozen=True)
class RowOf:
    """One row without padding."""

    columns: Tensor
    """Where it is in the padded row."""
    ids: Tensor
    vision: Tensor
    """bool [n]: places of vision tokens."""
    features: Tensor
    """[places, D], in the order of the places; differentiable."""
    additions: dict[int, Tensor]
    """Layer of the decoder -> what is added to the vision tokens at its input, [places, D]."""
    items: int
    """Images and videos."""
    position_ids: Tensor
    """[n], or [axes, n]"""
    words: dict[int, Tensor]
    """Text tokens with embeddings of their own in this call, [D]."""
    types: list[int]
    """Of each token, where masks follow them."""


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Any]
    rows: list[RowOf]


def base_of(model: Any) -> Any:
    """The class's model without its head; Llama 4 has none."""
    return getattr(model, "model", model)


def make_batch(
    case: Case, model: Any, rows: Sequence[Row], padding: Literal["left", "right"] = "left"
) -> Batch:
    """A batch of rows of words, `IMAGE` and `VIDEO`."""
    counts = {kind: [list(row).count(kind) for row in rows] for kind in (IMAGE, VIDEO)}
    inputs: dict[str, Any] = {}
    items: dict[str, list[list[Tensor]]] = {IMAGE: [], VIDEO: []}
    words: dict[int, Tensor] = {}
    layers: list[int] = []
    if sum(counts[IMAGE]):
        given = case.images(model, counts[IMAGE])
        inputs |= given
        output = base_of(model).get_image_features(**given, return_dict=True)
        if output.pooler_output is None:  # Fuyu, and Llama 4, whose forward projects them
            project = getattr(model, "multi_modal_projector", torch.nn.Identity())
            output.pooler_output = project(output.last_hidden_state)
        items[IMAGE] = _grouped(case, _wide(case, output), counts[IMAGE])
        layers = _layers(case, output)
        markers = getattr(output, "visual_indicator_features", None)
        if markers is not None:
            names = model.config.visual_indicator_token_ids
            words = dict(zip(names, markers, strict=True))
    if sum(counts[VIDEO]):
        assert case.videos is not None
        given = case.videos(model, counts[VIDEO])
        inputs |= given
        items[VIDEO], layers = _videos(case, model, given, sum(counts[VIDEO]))
    pending = {kind: list(found) for kind, found in items.items()}
    tokens = {IMAGE: IMAGE_TOKEN, VIDEO: IMAGE_TOKEN if case.same_token else VIDEO_TOKEN}
    made = []
    for row in rows:
        ids: list[int] = []
        types: list[int] = []
        features: list[Tensor] = []
        for word in row:
            if isinstance(word, int):
                part = [word]
            else:
                entries = pending[word].pop(0)
                lengths = [len(entry) for entry in entries]
                part = (case.ids if word == IMAGE else case.video_ids)(lengths, tokens[word])
                features += entries
            kind = {IMAGE: 1, VIDEO: 2}.get(word, 0) if isinstance(word, str) else 0
            types += [kind if token in tokens.values() else 0 for token in part]
            ids += part
        made.append((ids, types, features, sum(isinstance(word, str) for word in row)))
    return _padded(case, model, made, inputs, padding, words, layers)


def _padded(
    case: Case,
    model: Any,
    made: list[Any],
    inputs: dict[str, Any],
    padding: str,
    words: dict[int, Tensor],
    layers: list[int],
) -> Batch:
    width = max(len(ids) for ids, *_ in made)
    ids = torch.full((len(made), width), PAD)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    places = []
    for b, (row, kinds, *_) in enumerate(made):
        start = width - len(row) if padding == "left" else 0
        columns = torch.arange(start, start + len(row))
        ids[b, columns], types[b, columns], mask[b, columns] = (
            torch.tensor(row),
            torch.tensor(kinds),
            1,
        )
        places.append(columns)
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if case.typed:
        inputs["mm_token_type_ids"] = types
    given: list[list[int]] = [[] for _ in made]
    if case.token_types is not None:
        table = torch.zeros_like(ids)
        for b, (row, kinds, *_) in enumerate(made):
            given[b] = case.token_types(row, kinds)
            table[b, places[b]] = torch.tensor(given[b])
        inputs[case.type_input] = table
    positions = _position_ids(model, inputs)
    hidden = model.get_input_embeddings().weight
    rows = []
    for b, (_, _, features, items) in enumerate(made):
        columns = places[b]
        wide = hidden.shape[1] * (1 + len(layers))
        found = torch.cat(features) if features else hidden.new_zeros(0, wide)
        found, *added = found.split(hidden.shape[1], dim=1)
        additions = dict(zip(layers, added, strict=True))
        vision = types[b, columns] > 0
        own = torch.arange(len(columns)) + case.first_position
        if case.counts_padding:
            own = columns
        if positions is not None:
            own = positions[:, b, columns]
        rows.append(
            RowOf(columns, ids[b, columns], vision, found, additions, items, own, words, given[b])
        )
    return Batch({k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}, rows)


def _position_ids(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Ids [axes, B, L] of a class with several axes, from HF's own function."""
    if not hasattr(base_of(model), "get_rope_index"):
        return None
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    if not any(inputs.get(name) is not None for name in names[2:4]):
        real = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return real.expand(3, -1, -1)
    given = {n: inputs[n] for n in names if n in inputs}
    if "video_second_per_grid" in inputs:
        given["second_per_grids"] = inputs["video_second_per_grid"]
    found: Tensor = model.model.get_rope_index(**given)[0]
    return found


def _wide(case: Case, output: Any) -> Any:
    """Features beside what is added between the layers, [tokens, D * (1 + layers)] for each entry."""
    if not case.deepstack:
        return output.pooler_output
    if case.deepstack == "behind":
        lengths = [len(entry) for entry in output.pooler_output]
        layers = [  # in one piece before transformers 5.23
            torch.split(layer, lengths) if isinstance(layer, Tensor) else layer
            for layer in output.deepstack_features
        ]
        return [
            torch.cat(parts, dim=1) for parts in zip(output.pooler_output, *layers, strict=True)
        ]
    lists = [entries for _, entries in output.deepstack_features]
    return [torch.cat([parts[0] * 0, *parts], dim=1) for parts in zip(*lists, strict=True)]


def _layers(case: Case, output: Any) -> list[int]:
    """The layers at whose inputs features are added."""
    if not case.deepstack:
        return []
    if case.deepstack == "behind":
        return [k + 1 for k in range(len(output.deepstack_features))]
    return [layer for layer, _ in output.deepstack_features]


def _flat(output: Any) -> list[Tensor]:
    return [entry.reshape(-1, entry.shape[-1]) for entry in output]


def _grouped(case: Case, output: Any, counts: Sequence[int]) -> list[list[Tensor]]:
    """Entries of each image."""
    tiles = [case.entries(number) for number in range(sum(counts))]
    if case.by_row and len(output) == len(counts):  # transformers 5.17 gives tiles
        entries: list[Tensor] = []
        number = 0
        for row, count in zip(_flat([o for o in output]), counts, strict=True):
            own = sum(tiles[number : number + count])
            entries += list(row.chunk(own)) if own else []
            number += count
    else:
        entries = _flat(output)
    found = []
    for count in tiles:
        found.append([entries.pop(0) for _ in range(count)])
    assert not entries
    return found


def _videos(
    case: Case, model: Any, given: dict[str, Any], count: int
) -> tuple[list[list[Tensor]], list[int]]:
    encode = getattr(model.model, "get_video_features", None)
    if encode is None:  # through the encoder of images
        output = model.model.get_image_features(
            pixel_values=given["pixel_values_videos"], return_dict=True
        )
    else:
        taken = {k: v for k, v in given.items() if k != "video_compression_mask"}
        first = next(iter(inspect.signature(encode).parameters))  # of its own name in older classes
        taken[first] = taken.pop("pixel_values_videos")
        output = encode(**taken, return_dict=True)
        forward = inspect.getsource(inspect.unwrap(type(model.model).forward))
        if case.name == "llava_onevision" and "image_newline" in forward:
            ends = model.model.image_newline.expand(len(output.pooler_output), 1, -1)
            output.pooler_output = torch.cat([output.pooler_output, ends], dim=1)
    entries = _flat(_wide(case, output))
    videos = [[entries.pop(0) for _ in range(case.frames)] for _ in range(count)]
    return videos, _layers(case, output)
