"""Calibration: where to inject, prune and exit, and how much, from data.

calibration = hidrop_fx.calibrate(model, batches)
schedule = calibration.schedule(average_vision_tokens=64)
"""

from hidrop_fx.analysis.calibrating import calibrate
from hidrop_fx.analysis.calibration import Calibration, Decision, Score

__all__ = ["Calibration", "Decision", "Score", "calibrate"]
