"""Calibration batches, checked and encoded once: token ids, masks and image features.

    samples = prepare_samples(model, batches)     # the vision tower runs here, and never again
    for part in samples: part.features, part.valid, part.queries

A batch is what the model's `forward` takes (`processor(...)` gives it): `input_ids`, and where there
are any `attention_mask`, `pixel_values`, `position_ids` and `labels`. Projected images are kept in
main memory, `tokens x hidden_size` numbers an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hidrop_fx.errors import InputError, UnsupportedModelError
from hidrop_fx.models import Family, Modality, family_of
from hidrop_fx.models.encoding import encode
from hidrop_fx.ops.masks import CHUNKED
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import IGNORE, count_images, lay_out
from hidrop_fx.schedule.schedule import Schedule

_TAKEN = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One batch of B rows and L columns, on the CPU."""

    ids: Tensor
    """int64 [B, L]"""
    mask: Tensor | None
    """The attention mask [B, L] as given."""
    position_ids: Tensor | None
    """int64 [B or 1, L], or [axes, B, L]"""
    labels: Tensor | None
    """int64 [B, L], -100 where nothing is asked; None where no batch has any."""
    features: tuple[Tensor, ...]
    """Projected images [tokens, D] of all rows, in order."""
    images: tuple[int, ...]
    """Images of each row."""
    kind: str
    """"image", or "video" where `features` and `images` are those of videos."""
    valid: Tensor
    """bool [B, L]: real tokens."""
    placeholder: Tensor
    """bool [B, L]: places of vision tokens."""
    queries: Tensor
    """int64 [B, Q]: columns whose attention is the score; -1 where a row has fewer."""
    predicting: Tensor
    """bool [B, L]: columns whose next token is compared: those before supervised tokens, or else the
    last one."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vision(self) -> Tensor:
        """bool [B, L]: vision tokens."""
        return self.valid & self.placeholder

    @property
    def text(self) -> Tensor:
        """bool [B, L]: text tokens."""
        return self.valid & ~self.placeholder

    @property
    def vision_counts(self) -> list[int]:
        """Vision tokens of each row."""
        counts: list[int] = self.vision.sum(dim=1).tolist()
        return counts

    def take(self, rows: Sequence[int]) -> "Samples":
        """Return some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.long, device="cpu")
        starts = [sum(self.images[:row]) for row in range(len(self))]
        return Samples(
            ids=self.ids[index],
            mask=None if self.mask is None else self.mask[index],
            position_ids=_rows(self.position_ids, index),
            labels=None if self.labels is None else self.labels[index],
            features=tuple(
                feature
                for row in rows
                for feature in self.features[starts[row] : starts[row] + self.images[row]]
            ),
            images=tuple(self.images[row] for row in rows),
            kind=self.kind,
            valid=self.valid[index],
            placeholder=self.placeholder[index],
            queries=self.queries[index],
            predicting=self.predicting[index],
        )


@torch.no_grad()
def prepare_samples(
    model: Any, batches: Iterable[Mapping[str, Any]], *, progress: bool = False
) -> list[Samples]:
    """Check the batches and encode their images.

    Raises:
        InputError: there is no batch or no image, a batch is no mapping with `input_ids`, only some
            batches have labels, or images and placeholders do not match.
    """
    bar = tqdm(batches, desc="images", disable=not progress, leave=False)
    found = [_checked(model, batch, number) for number, batch in enumerate(bar)]
    if not found:
        raise InputError("batches is empty: calibration needs at least one sample")
    if not any(part.features for part in found):
        raise InputError(
            f"none of the {sum(map(len, found))} calibration samples has an image, so there are no "
            "vision tokens to schedule: pass batches with pixel_values"
        )
    labelled = [part.labels is not None for part in found]
    if any(labelled) and not all(labelled):
        raise InputError(
            f"batch {labelled.index(True)} has labels and batch {labelled.index(False)} has none: "
            "give them to all batches, or to none to compare with the full model instead"
        )
    return found


def _checked(model: Any, batch: Any, number: int) -> Samples:
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            f"batch {number} has no input_ids ({keys}): each batch must be a mapping of what the "
            "model's forward takes, as its processor returns it (wrap a single one in a list)"
        )
    family = family_of(model)
    _check_measurable(model, family)
    tensors = {name: _on_cpu(batch.get(name)) for name in _TAKEN}
    ids, labels, mask = tensors["input_ids"], tensors["labels"], tensors["attention_mask"]
    assert ids is not None
    if ids.dim() != 2 or ids.numel() == 0:
        raise InputError(
            f"batch {number}: input_ids has shape {tuple(ids.shape)}, not [rows, length]"
        )
    for name, tensor in (("attention_mask", mask), ("labels", labels)):
        if tensor is not None and tensor.shape != ids.shape:
            raise InputError(
                f"batch {number}: {name} has shape {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}"
            )
    kind = _kind(family, batch, number)
    placeholder = torch.isin(ids, torch.tensor(family.tokens(model.config), device=ids.device))
    valid = torch.ones_like(placeholder) if mask is None else mask.bool()
    inputs = _on_device(model, batch)
    features = _features(model, family, kind, inputs)
    if not features and placeholder.any():
        raise InputError(
            f"batch {number} has {int(placeholder.sum())} image placeholder tokens but no "
            f"{kind.pixels}; pass the images too"
        )
    positions = tensors["position_ids"]
    if positions is None and family.position_ids is not None:
        made = family.position_ids(model.model, inputs)
        positions = None if made is None else made.cpu()
    try:
        images = count_images(placeholder, [len(feature) for feature in features])
        queries = _queries(ids, valid, placeholder, images, labels)
    except InputError as error:
        raise InputError(f"batch {number}: {error}") from error
    return Samples(
        ids=ids,
        mask=mask,
        position_ids=positions,
        kind=kind.name,
        labels=labels,
        features=tuple(features),
        images=tuple(images),
        valid=valid,
        placeholder=placeholder,
        queries=queries,
        predicting=_predicting(valid, labels, number),
    )


def _check_measurable(model: Any, family: Family) -> None:
    """Check that a decoder does what the class does, given embeddings with the features at their places.

    Raises:
        UnsupportedModelError: names what the measurements would leave out.
    """
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    left_out = {
        "masks in which tokens see each other both ways": family.blocks,
        "features that are added in its layers": family.deepstack,
        "features that are added to embeddings": family.adds_features or None,
        "text embeddings of its own": family.text_embeds,
        "layers that attend by chunks": CHUNKED if CHUNKED in types else None,
    }
    found = [what for what, declared in left_out.items() if declared is not None]
    if found:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be calibrated: it has {' and '.join(found)}, and the measurements run "
            "the decoder alone, on embeddings with the features at their places and under causal masks. Give a "
            "schedule, and compare it with hidrop_fx.compare"
        )


def _kind(family: Family, batch: Mapping[str, Any], number: int) -> Modality:
    """Return the one kind of vision inputs that a batch has, images where it has none."""
    given = [kind for kind in family.modalities if kind.given(batch)]
    if len(given) > 1:
        raise InputError(
            f"batch {number} has {' and '.join(kind.name + 's' for kind in given)}: give batches of one kind"
        )
    return given[0] if given else family.modalities[0]


def _features(
    model: Any, family: Family, kind: Modality, inputs: Mapping[str, Any]
) -> list[Tensor]:
    if inputs.get(kind.pixels) is None:
        return []
    return [feature.cpu() for feature in encode(family, model.model, inputs).features]


def _on_device(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def _queries(
    ids: Tensor, valid: Tensor, placeholder: Tensor, images: list[int], labels: Tensor | None
) -> Tensor:
    """Return the columns [B, Q] that a compiled model scores from."""
    layout = lay_out(
        Plan.of(Schedule(), 1),
        valid=valid,
        placeholder=placeholder,
        position_ids=torch.arange(ids.shape[1], device="cpu").expand_as(ids),
        images=images,
        labels=labels,
    )
    return layout.query_columns


def _predicting(valid: Tensor, labels: Tensor | None, number: int) -> Tensor:
    columns = torch.arange(valid.shape[1], device="cpu")
    last = torch.where(valid, columns, -1).amax(dim=1)
    if labels is None:
        return columns[None] == last[:, None]
    asked = torch.zeros_like(valid)
    asked[:, :-1] = (labels[:, 1:] != IGNORE) & valid[:, 1:] & valid[:, :-1]
    empty = (~asked.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"row {empty[0]} of batch {number} has labels but none that is not {IGNORE}: every sample "
            "needs an answer, or leave labels out of all batches"
        )
    return asked


def _on_cpu(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value, device="cpu")


def _rows(ids: Tensor | None, index: Tensor) -> Tensor | None:
    if ids is None or ids.shape[-2] == 1:
        return ids
    return ids[..., index, :]
