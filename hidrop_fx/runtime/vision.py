"""Vision tokens for a prompt: encoded before the decoder runs, or beside its text-only layers.

    serial:  tower -> projector -> text layers -> inject -> ...
    side:    tower -> projector --┐
             text layers ---------┴-> inject -> ...

The side stream is a second CUDA stream; a recording captures it as a fork and a join.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import family_of
from hidrop_fx.passes.overlap_vision import SIDE_STREAM
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.planning.geometry import vision_tokens_per_image
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.runtime.tower_state import TowerState


def trains(scheduled: ScheduledModel, inputs: dict[str, Any]) -> bool:
    """Return True if the features of a call's images carry gradients, to the pixels or to parameters."""
    if not torch.is_grad_enabled():
        return False
    pixels: Tensor | None = inputs.get("pixel_values")
    if pixels is not None and pixels.requires_grad:
        return True
    decoder = scheduled.decoder
    parts = [m for m in scheduled.base.children() if decoder not in m.modules()]
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def fills_rows(layout: Layout, features: Tensor) -> bool:
    """Return True if features of one kind are the vision stream as they come: rows equally long, none a text token's."""
    columns = layout.vision_columns
    return columns.numel() == len(features) and bool((columns < layout.columns).all())


def overlap_lengths(model: Any, inputs: dict[str, Any]) -> list[int] | None:
    """Return the tokens of each image where a side stream may encode them: known before, all alike; else None."""
    pixels: Tensor | None = inputs.get("pixel_values")
    tokens = vision_tokens_per_image(model)
    if pixels is None or tokens is None or inputs.get("mm_encoder_outputs"):
        return None
    taken = [name for kind in family_of(model).modalities for name in kind.inputs]
    plain = all(inputs.get(name) is None for name in taken if name != "pixel_values")
    if pixels.dim() != 4 or not plain:
        return None
    return [tokens] * len(pixels)


def pixels(base: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the images in the tower's own dtype and device: recordings depend on both."""
    found: Tensor = inputs["pixel_values"]
    tower = getattr(base, "vision_tower", None)
    weight = None if tower is None else next(tower.parameters(), None)
    return found if weight is None else found.to(weight.device, weight.dtype)


_PIXEL_VALUES = InputSpec(
    "pixel_values",
    ("images", "channels", "height", "width"),
    torch.float32,
    lambda call: call.pixel_values,
)
_FEATURE_PLACES = InputSpec(
    "feature_places", ("batch", "vision"), torch.int64, lambda call: call.feature_places
)


class WithVision(Executable):
    """A prefill program, and the vision tower that runs beside its first layers.

    Inputs are those of the program, with `pixel_values` and `feature_places` [B, V] in the place of
    `vision_embeds`; outputs have the `features` too.
    """

    def __init__(
        self, made: Executable, encode: Callable[[Tensor], Tensor], state: TowerState
    ) -> None:
        """Put a tower beside a program.

        Args:
            encode: pixels of all images -> features [tokens, D].
            state: of the modules that it runs.
        """
        super().__init__(made.program, made.top, made.bodies)
        self._encode = encode
        self._tower = state
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}
        """One a device, shared by copies of this object: each recording makes one."""
        own = [spec for spec in made.specs if spec.name != "vision_embeds"]
        self.specs = (_PIXEL_VALUES, _FEATURE_PLACES, *own)
        self.inputs = tuple(spec.name for spec in self.specs)
        self._program_inputs = made.inputs

    def __call__(self, inputs: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        """Run; `recompute` has no meaning in prefill."""
        self.calls += 1
        pixels, places, like = (
            inputs[name] for name in ("pixel_values", "feature_places", "text_embeds")
        )
        if not like.is_cuda:
            return self._run(inputs, *self._vision(pixels, places, like))
        side = self._side_streams.get(like.device)
        if side is None:
            side = self._side_streams[like.device] = torch.cuda.Stream(like.device)
        main = torch.cuda.current_stream(like.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            features, vision = self._vision(pixels, places, like)
        token = SIDE_STREAM.set(side)
        try:
            outputs = self._run(inputs, features, vision)
        finally:
            SIDE_STREAM.reset(token)
            main.wait_stream(side)
            features.record_stream(main)
        return outputs

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers that a call reads, the tower's too."""
        return [*super().tensors, *self._tower.tensors]

    def state(self, *, grad: bool) -> tuple[Hashable, ...]:
        """Return what else than its inputs a call depends on: a recording does not run the tower's Python."""
        return (*super().state(grad=grad), self._tower.key)

    def _vision(self, pixels: Tensor, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        features = self._encode(pixels).to(like.dtype)
        return features, features[places]

    def _run(
        self, inputs: dict[str, Tensor], features: Tensor, vision: Tensor
    ) -> dict[str, Tensor]:
        given = inputs | {"vision_embeds": vision}
        outputs = self.run_top([given[name] for name in self._program_inputs])
        return outputs | {"features": features}
