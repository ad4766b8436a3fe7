"""The typical calibration sample that budgets are computed for."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.planning import Costs, plan
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class TypicalSample:
    """Sizes that costs are computed for."""

    geometry: Geometry
    text_tokens: int
    """Mean over the samples, rounded."""
    tokens_per_image: int
    """Median over the images."""
    images: int
    """Mean over the samples that have any, rounded."""

    def plan(self, schedule: Schedule, *, images: int | None = None) -> Costs:
        """Plan a schedule for this sample, or for one with another number of images."""
        count = self.images if images is None else images
        sizes = {k: v for k, v in asdict(self.geometry).items() if k != "kinds"}
        made = plan(
            schedule,
            text_tokens=self.text_tokens,
            vision_tokens=count * self.tokens_per_image,
            images=count,
            **sizes,
        )
        return replace(made, geometry=self.geometry)


def typical_sample(model: Any, samples: Sequence[Samples]) -> TypicalSample:
    """Compute the typical sizes of samples with images."""
    text = [n for part in samples for n in part.text.sum(dim=1).tolist()]
    images = [count for part in samples for count in part.images if count]
    lengths = [len(feature) for part in samples for feature in part.features]
    return TypicalSample(
        geometry=Geometry.from_model(model),
        text_tokens=max(1, round(statistics.mean(text))),
        tokens_per_image=statistics.median_low(lengths),
        images=round(statistics.mean(images)),
    )
