"""Budgets: limits on a schedule's cost, and the largest level inside one.

    budget = average_budget(16, sample)
    level  = largest_level(lambda level: budget.cost(schedule_at(level)), budget.limit, highest)

All costs but the latency are those of `hidrop_fx.plan` for a typical calibration sample, so a solved
schedule costs at most the limit and one level more would cost more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hidrop_fx.analysis.data.typical_sample import TypicalSample
from hidrop_fx.errors import ScheduleError
from hidrop_fx.planning import Costs
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit, and the cost it is compared with."""

    name: str
    limit: float
    unit: str
    cost: Callable[[Schedule], float]

    def __str__(self) -> str:
        return f"{self.name} <= {self.limit:.4g} {self.unit}".rstrip()

    def allows(self, schedule: Schedule) -> bool:
        """Return True if a schedule costs at most the limit."""
        return self.cost(schedule) <= self.limit


def budget_of(
    sample: TypicalSample,
    *,
    average_vision_tokens: float | None = None,
    flops_share: float | None = None,
    kv_share: float | None = None,
    latency: float | None = None,
    seconds: Callable[[Schedule], float] | None = None,
    **unknown: Any,
) -> Budget:
    """Return the one budget that is given.

    Args:
        sample: sizes that costs are computed for.
        average_vision_tokens: of one image, a layer, over all layers (`Costs.average_vision_tokens`).
        flops_share: in (0, 1], of the untouched model's prefill FLOPs (`Costs.flops`), text included.
        kv_share: in (0, 1], of its KV bytes (`Costs.kv_bytes`), text included.
        latency: seconds of one sample's prefill, as `seconds` measures it.

    Raises:
        ScheduleError: none or several are given, or one makes no sense.
    """
    given = {
        "average_vision_tokens": average_vision_tokens,
        "flops_share": flops_share,
        "kv_share": kv_share,
        "latency": latency,
    }
    if unknown:
        raise ScheduleError(f"{', '.join(unknown)}: no such budget; use one of {', '.join(given)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ScheduleError(
            f"give exactly one budget of {', '.join(given)}; got {', '.join(chosen) or 'none'}"
        )
    ((name, limit),) = chosen.items()
    share = name.endswith("_share")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise ScheduleError(f"{name}={limit!r}: use a number above 0")
    if share and limit > 1:
        raise ScheduleError(f"{name}={limit}: a share of the untouched model's lies in (0, 1]")
    costs: dict[str, Callable[[Schedule], float]] = {
        "average_vision_tokens": lambda s: sample.plan(s, images=1).average_vision_tokens,
        "flops_share": lambda s: _ratio(sample.plan(s), "flops"),
        "kv_share": lambda s: _ratio(sample.plan(s), "kv_bytes"),
    }
    if name == "latency":
        if seconds is None:
            raise ScheduleError(
                f"latency={limit}: a latency is measured, which needs the model; call "
                "calibration.attach(model, batches) first"
            )
        return Budget(name=name, limit=limit, unit="s", cost=seconds)
    return Budget(name=name, limit=limit, unit="", cost=costs[name])


def largest_level(cost: Callable[[int], float], limit: float, highest: int) -> int:
    """Find the highest level of 1 .. `highest` with `cost(level) <= limit`; 0 if there is none.

    `cost` must not fall with the level; a measured one is asked at about log2(highest) levels.
    """
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _ratio(made: Costs, cost: str) -> float:
    value: Any = getattr(made, cost)
    return float(value / getattr(made.identity, cost))
