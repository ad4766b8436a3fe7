"""What a forward hands to the encoder of its images, by whatever names: read off its code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hidrop_fx.models import inferred


class Named:
    """Both have one name for each."""

    def get_image_features(self, pixel_values: Any, grid: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(pixel_values=pixel_values, grid=grid, kwargs=kwargs)

    def forward(self, input_ids: Any, pixel_values: Any = None, grid: Any = None) -> Any:
        return self.get_image_features(pixel_values, grid)


class Renamed(Named):
    """The encoder has another name for what it is given by place."""

    def forward(self, input_ids: Any, pixel_values_videos: Any = None, grid: Any = None) -> Any:
        return self.get_image_features(pixel_values_videos, grid=grid, return_dict=True)


class InKeywords(Named):
    """The encoder hands further arguments on to its tower, and names none."""

    def forward(self, input_ids: Any, pixel_values: Any = None, image_sizes: Any = None) -> Any:
        features = self.get_image_features(pixel_values=pixel_values, image_sizes=image_sizes)
        return features


class Elsewhere(Named):
    """The forward has the encoder called by something else."""

    def forward(self, input_ids: Any, pixel_values: Any = None) -> Any:
        return self.encoded(pixel_values)

    def encoded(self, pixel_values: Any) -> Any:
        return self.get_image_features(pixel_values)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Named, {"pixel_values": "pixel_values", "grid": "grid"}),
        (Renamed, {"pixel_values": "pixel_values_videos", "grid": "grid"}),
        (InKeywords, {"pixel_values": "pixel_values", "image_sizes": "image_sizes"}),
        (Elsewhere, {"pixel_values": "pixel_values"}),
    ],
)
def test_arguments_reach_the_encoder_under_its_own_names(cls: Any, names: dict[str, str]) -> None:
    base = cls()
    found = inferred._encoder_arguments(base, "get_image_features")
    assert found == names
    given = {argument: torch.tensor(place) for place, argument in enumerate(names.values())}
    output = inferred._encode(
        base, given, method="get_image_features", names=found, first=frozenset()
    )
    taken = {"pixel_values": output.pixel_values, "grid": output.grid, **output.kwargs}
    for name, argument in names.items():
        assert taken[name] is given[argument]
