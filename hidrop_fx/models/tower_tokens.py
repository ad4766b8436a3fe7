"""What a LLaVA's vision tower holds at the layer that the projector reads: states, attention and keys.

    with TowerWatch(base) as tower:
        base.get_image_features(pixel_values)
    tower.tokens(range(E), images=E, patches=n)  # `TowerTokens`

Attention is computed again from the layer's own projections, for one query row: towers run fused kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import base_of
from hidrop_fx.errors import InputError, UnsupportedModelError
from hidrop_fx.methods.reducers import Reduction
from hidrop_fx.models.family import Family
from hidrop_fx.models.kept_cells import check_cells
from hidrop_fx.models.rope_parts import check_copies
from hidrop_fx.ops.reduction import TowerTokens


def check_reduction(model: Any, family: Family, reduction: Reduction | None) -> None:
    """Check that a reducer finds what it reads, and that the model makes no more of an image than its features.

    Raises:
        UnsupportedModelError: the model has another tower, or no projector of single tokens; or its masks or
            layers know an image's tokens by more than that they are there.
    """
    if reduction is None:
        return
    if family.beyond_features is not None:
        raise UnsupportedModelError(
            f"before={reduction} takes tokens out of an image before the decoder, and "
            f"{type(model).__name__} has {family.beyond_features}; prune within the decoder, as prune={{1: 64}}"
        )
    if reduction.reducer.reads_tower:
        _layer(base_of(model), str(reduction))
    if reduction.reducer.members:
        check_copies(model, family, reduction)
    if reduction.reducer.module is not None:
        check_cells(model, family, str(reduction))


class TowerWatch:
    """Keeps what one layer of the tower reads and returns, while it is entered."""

    def __init__(self, base: Any, reduction: Reduction) -> None:
        self._layer = _layer(base, str(reduction))
        self._projections: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "TowerWatch":
        layer = self._layer
        self._hooks = [
            layer.self_attn.register_forward_pre_hook(self._note_input, with_kwargs=True),
            layer.register_forward_hook(self._note_output),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def ran(self) -> bool:
        """True if the tower ran meanwhile."""
        return self._output is not None

    def tokens(self, chosen: Sequence[int], *, images: int, patches: int) -> TowerTokens:
        """Return the tower's tokens of some of the images.

        Args:
            images: in all. patches: features of each.

        Raises:
            InputError: features and tower do not have as many images or tokens.
        """
        hidden = self._output
        assert self._projections is not None
        assert hidden is not None
        extra = hidden.shape[1] - patches
        if len(hidden) != images or extra not in (0, 1):
            raise InputError(
                f"the vision tower ran on {len(hidden)} images of {hidden.shape[1]} tokens for {images} images of "
                f"{patches}: a reducer that reads the tower needs one tower image for each, and one feature for "
                "each patch"
            )
        index = torch.tensor(list(chosen), device=hidden.device)
        hidden = hidden[index]
        with torch.no_grad():
            query, keys = (each[index] for each in self._projections)
            query = (query[:, :1] if extra else query).transpose(1, 2)
            logits = query @ keys.permute(0, 2, 3, 1) * keys.shape[-1] ** -0.5
            weights = logits.float().softmax(dim=-1)
            paid = weights[:, :, 0].sum(dim=1) if extra else weights.sum(dim=1).mean(dim=1)
        return TowerTokens(
            hidden=hidden[:, extra:],
            cls=hidden[:, :1] if extra else None,
            attention=paid[:, extra:],
            keys=keys.mean(dim=2)[:, extra:],
        )

    @torch.no_grad()
    def _note_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Project queries and keys [images, N, heads, d] here: behind the layer's call nothing gathers what an engine shards."""
        normed = (args[0] if args else kwargs["hidden_states"]).detach()
        heads = module.num_heads, -1
        query, keys = module.q_proj(normed), module.k_proj(normed)
        self._projections = query.unflatten(2, heads), keys.unflatten(2, heads)

    def _note_output(self, module: Any, args: Any, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output


def projected(base: Any, states: Tensor) -> Tensor:
    """Project states of the tower [E, m, V] to the decoder's width -> [E, m, D]."""
    found: Tensor = base.multi_modal_projector(states)
    return found


def _layer(base: Any, reduction: str) -> Any:
    """Return the layer of the tower whose output the projector takes."""
    tower = getattr(base, "vision_tower", None)
    tower = getattr(tower, "vision_model", tower)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    place = getattr(base.config, "vision_feature_layer", None)
    if layers is not None and isinstance(place, int) and hasattr(base, "multi_modal_projector"):
        # hidden_states[0] is what enters the first layer.
        layer = layers[place if place < 0 else place - 1]
        if all(hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "num_heads")):
            return layer
    raise UnsupportedModelError(
        f"before={reduction} reads the vision tower, and that of {type(base).__name__} is not like LLaVA's: "
        "vision_tower.encoder.layers with self_attn.q_proj, k_proj and num_heads, one vision_feature_layer, "
        "multi_modal_projector. Use a reducer that reads features, such as divprune"
    )
