"""Encode a call's images and videos: features of every entry, kind after kind.

encoded = encode(family, base, inputs)
torch.cat(encoded.features)       # in the order of `feature_places`
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.models.family import Family, Modality


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Vision features of a call."""

    features: list[Tensor] = field(default_factory=list)
    """[tokens, D] of every entry, in order, kind after kind."""
    lengths: tuple[list[int], ...] = ()
    """Tokens of every entry, by kind in the order of the family's modalities."""
    additions: tuple[list[Tensor], ...] = ()
    """Features [tokens, D] of every entry that the decoder adds between its layers: layer by layer, in the
    order of `features`; none where the class adds none."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """What the encoders returned, by kind; only of kinds that the call has."""


@dataclass(kw_only=False, eq=False)
class KnownFeatures:
    """Features as they go to their places, in the place of what an encoder returns."""

    pooler_output: list[Tensor]
    """[tokens, D] of every entry."""
    deepstack_features: Any = None


def encode(family: Family, base: Any, inputs: Mapping[str, Any]) -> Encoded:
    """Run the encoder of each kind that a call has, or take what was encoded before.

    Raises:
        InputError: pixels came with features, or an argument that their encoder needs is missing.
    """
    features: list[Tensor] = []
    lengths: list[list[int]] = []
    outputs: dict[str, Any] = {}
    before = inputs.get("mm_encoder_outputs") or {}
    for kind in family.modalities:
        output = before.get(kind.name)
        if output is not None and inputs.get(kind.pixels) is not None:
            raise InputError(f"pass either {kind.pixels} or mm_encoder_outputs, not both")
        if output is None and inputs.get(kind.pixels) is not None:
            output = _encoded(kind, base, inputs)
        if output is None:
            lengths.append([])
            continue
        if family.deepstack is not None and getattr(output, "deepstack_features", None) is None:
            raise InputError(
                f"an output of this model's encoder has deepstack_features, and the {type(output).__name__} in "
                "mm_encoder_outputs has none; pass what get_image_features returns"
            )
        outputs[kind.name] = output
        entries = _entries(kind, base, output, inputs)
        features += entries
        lengths.append([len(entry) for entry in entries])
    return Encoded(
        features=features,
        lengths=tuple(lengths),
        additions=_additions(family, base.config, outputs.values()),
        outputs=outputs,
    )


def once(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Take back that every tensor's entries were repeated one by one, e.g. pixels a, a, b, b."""
    return {n: v[::copies].contiguous() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def for_copies(encoded: Encoded, counts: Sequence[Sequence[int]], copies: int) -> Encoded:
    """Repeat the features of rows that were encoded once, those of a row together.

    Args:
        counts: entries of each row, by kind.
        copies: of each row, one behind another.
    """
    order: list[int] = []
    lengths: list[list[int]] = []
    for tokens, rows in zip(encoded.lengths, counts, strict=True):
        start, own = sum(map(len, encoded.lengths[: len(lengths)])), []
        for count in rows:
            own += [*range(start, start + count)] * copies
            start += count
        first = start - len(tokens)
        lengths.append([tokens[place - first] for place in own])
        order += own
    return Encoded(
        features=[encoded.features[place] for place in order],
        lengths=tuple(lengths),
        additions=tuple([layer[place] for place in order] for layer in encoded.additions),
        outputs=encoded.outputs,
    )


def joined(features: Sequence[Tensor]) -> Tensor | None:
    """Concatenate features of all entries -> [tokens, D]; None if there are none."""
    if len(features) < 2:
        return features[0] if features else None
    return torch.cat(list(features))


def _additions(family: Family, config: Any, outputs: Collection[Any]) -> tuple[list[Tensor], ...]:
    if family.deepstack is None or not outputs:
        return ()
    by_kind = [family.deepstack.features(config, output) for output in outputs]
    layers = zip(*by_kind, strict=True)
    return tuple([entry for kind in layer for entry in kind if len(entry)] for layer in layers)


def _encoded(kind: Modality, base: Any, inputs: Mapping[str, Any]) -> Any:
    given = {name: inputs[name] for name in kind.inputs if inputs.get(name) is not None}
    try:
        return kind.encode(base, given)
    except (AttributeError, TypeError, ValueError) as error:
        missing = [name for name in kind.inputs if name not in given]
        if not missing:
            raise
        raise InputError(
            f"{type(base).__name__} cannot encode {kind.pixels} without one of {', '.join(missing)} "
            f"({error}); pass all that the model's processor returns"
        ) from error


def _entries(kind: Modality, base: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    if kind.features is not None and not isinstance(output, KnownFeatures):
        return [entry for entry in kind.features(base, output, inputs) if len(entry)]
    pooled = output.pooler_output
    if isinstance(pooled, Tensor) and pooled.dim() == 2:
        pooled = pooled[None]
    return [
        entry if entry.dim() == 2 else entry.reshape(-1, entry.shape[-1])
        for entry in pooled
        if entry.numel()
    ]
