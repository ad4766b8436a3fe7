"""Schedules: when vision tokens enter, how many survive which layer, where they leave; the user writes them."""

from hidrop_fx.schedule.schedule import (
    POSITIONS,
    PRESETS,
    SCORES,
    Keeps,
    Schedule,
    checked_int,
    keep_count,
)

__all__ = ["POSITIONS", "PRESETS", "SCORES", "Keeps", "Schedule", "checked_int", "keep_count"]
