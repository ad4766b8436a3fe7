"""Schedules: when vision tokens enter, how many survive which layer, where they leave; the user writes them."""

from hidrop_fx.schedule.keeps import Keeps, checked_int, keep_count
from hidrop_fx.schedule.presets import PRESETS
from hidrop_fx.schedule.schedule import POSITIONS, SCORES, Schedule

__all__ = ["POSITIONS", "PRESETS", "SCORES", "Keeps", "Schedule", "checked_int", "keep_count"]
