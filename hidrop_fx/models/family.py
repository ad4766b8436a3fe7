"""The interface of a model family: what a class of VLMs does with vision inputs, positions, embeddings and logits.

    family.modalities       # images, videos: which tokens they fill, how they are encoded
    family.position_ids     # where the class makes other ids than 0, 1, 2, ...
    family.logits           # where the class scales or caps what its head gives

Most classes need no file: `hidrop_fx.models.inferred` reads a family off the class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hidrop_fx.ops.masks import CHUNKED, BlockRule, MaskRule
from hidrop_fx.planning.deepstack import Deepstack

CountItems = Callable[[Tensor | None, Tensor], list[int]]
"""Items of each row, from its ids int64 [B, L] (None where embeddings were given) and places bool [B, L]."""


CountUnits = Callable[[Tensor, Sequence[int], Tensor], list[int]]
"""Tiles or frames of each row, from its places bool [B, L], the tokens of each entry of the features, and the
position ids [B, L] or [axes, B, L]."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of vision input: images, or videos."""

    name: str
    """"image" or "video", its key in `mm_encoder_outputs`."""
    token: Callable[[Any], int]
    """Token id of its places in the prompt, from the model's config."""
    inputs: tuple[str, ...]
    """Arguments of forward that its encoder takes; the first holds the pixels."""
    encode: Callable[[Any, dict[str, Any]], Any]
    """Features from the base model and the arguments that were given: an output whose `pooler_output` is a
    tensor [entries, tokens, D], or a list or tuple of [tokens, D]."""
    features: Callable[[Any, Any, Mapping[str, Any]], list[Tensor]] | None = None
    """Features [tokens, D] of every entry, from the base model, the encoder's output and the arguments of the call,
    where they are not its `pooler_output`."""
    count: CountItems | None = None
    """Items as the user gave them, row by row, where an entry of the features is another thing: a tile, a
    frame, a row of the batch. None where each entry is one item."""
    units: CountUnits | None = None
    """Tiles of images, or frames of videos, row by row; None where they cannot be told."""
    completed: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    """Arguments with those that the encoder assumes where they are missing, from the model's config and what was
    given, so that entries can be told apart."""
    lengths: Callable[[Any, Mapping[str, Any]], list[int] | None] | None = None
    """Tokens of each entry, where the model's config and the arguments tell them without the encoder."""

    @property
    def pixels(self) -> str:
        """The argument of forward that holds the pixels."""
        return self.inputs[0]

    def given(self, inputs: Mapping[str, Any]) -> bool:
        """Return True if a call has items of this kind, as pixels or encoded."""
        encoded = inputs.get("mm_encoder_outputs")
        return inputs.get(self.inputs[0]) is not None or bool(
            encoded and encoded.get(self.name) is not None
        )


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Tokens of a prompt that see each other both ways: those of an image, or a prefix."""

    argument: str
    """Argument of forward, int64 [B, L], that tells them; a call without it has none."""
    of: Callable[[Tensor], Tensor]
    """The block of each token, int64 [B, L], -1 for none, from that argument."""
    rule: BlockRule
    """How they go with a sliding window."""
    layers: tuple[str, ...] | None = None
    """The layer types that know them; None for all."""
    required: bool = False
    """The class trains with it alone."""
    vision: int = 1
    """Value of the argument at a place of an image; words have 0."""


@dataclass(frozen=True, kw_only=True)
class TowerAdditions:
    """Features that a class's decoder adds to its vision tokens between the layers (deepstack)."""

    places: Callable[[Any], Deepstack]
    """The layers where they are added, from the model's config."""
    features: Callable[[Any, Any], Sequence[Sequence[Tensor]]]
    """Features [tokens, D] of every entry, layer by layer in the order of `places(config).layers`, from the
    model's config and an encoder's output."""
    repeated: Callable[[Any, list[Tensor]], Any]
    """`deepstack_features` of an encoder's output that has the same entries for every layer, from the model's
    config and these: what a call is warmed up with."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of VLMs: how vision inputs are encoded and placed, and the types of its outputs."""

    modalities: tuple[Modality, ...]
    base_output: type
    """Type of what `model.model(...)` returns."""
    output: type
    """Type of what `model(...)` returns."""
    inputs: frozenset[str] = frozenset()
    """Further arguments of forward that the family reads, e.g. `mm_token_type_ids`."""
    axes: int = 1
    """Axes of the position ids: 1, or 3 for time, height and width."""
    position_ids: Callable[[Any, dict[str, Any]], Tensor | None] | None = None
    """Ids of a prompt, [B, L] or [axes, B, L], from the base model and the arguments of a call that has
    none; None where its columns are counted from 0."""
    text_embeds: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor] | None = None
    """Embeddings [B, T, D] of text tokens, from the base model, ids [B, T], their plain embeddings and
    the encoders' outputs by modality, where a class has more than a look-up."""
    words: Callable[[Any, Tensor], Tensor] | None = None
    """Ids that are looked up in the embedding for ids [B, T], from the model's config, where a class embeds
    some as others."""
    adds_features: bool = False
    """Features are added to the embeddings of their places, which they replace in other classes."""
    logits: Callable[[Any, Tensor], Tensor] | None = None
    """Logits from the model's config and the head's rows, where a class scales or caps them."""
    blocks: Blocks | None = None
    """Tokens that see each other both ways, where a class's masks are not causal alone."""
    deepstack: TowerAdditions | None = None
    """What the decoder adds to vision tokens between its layers."""
    unread: frozenset[str] = frozenset()
    """Arguments that the class's forward reads and no compiled model does: a call that has one is refused."""
    configured: "Callable[[Family, Any], Family] | None" = None
    """The family of one model of the class, from its config, where models of a class differ; raises for those that
    cannot be scheduled."""
    declares: frozenset[str] = frozenset()
    """Steps of the class's forward that this family accounts for, by the names that
    `hidrop_fx.models.forward_code` finds them under."""

    def rule(self, mask: str, window: int | None) -> MaskRule:
        """Return the rule of a captured mask, "mask" or "mask_<layer type>", whose layers have a window, chunks or neither."""
        blocks, kind = self.blocks, mask.removeprefix("mask_")
        if kind == CHUNKED:
            return MaskRule(chunk=window)
        if blocks is None or not (blocks.layers is None or kind in blocks.layers):
            return MaskRule(window=window)
        return MaskRule(window=window, blocks=blocks.rule)

    @property
    def beyond_features(self) -> str | None:
        """What the decoder knows of an image beside its features at their places; None for nothing."""
        if self.deepstack is not None:
            return "features between its layers"
        return None if self.blocks is None else "masks that know which tokens make an image"

    def embedded_ids(self, config: Any, ids: Tensor) -> Tensor:
        """Return the ids that the embedding is asked for in the place of ids [B, T]."""
        return ids if self.words is None else self.words(config, ids)

    def modality(self, name: str) -> Modality | None:
        """Return the modality of a name, None if the class has none."""
        return next((kind for kind in self.modalities if kind.name == name), None)

    def tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids of all vision places, in the order of the modalities."""
        return tuple(kind.token(config) for kind in self.modalities)
