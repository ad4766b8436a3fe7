"""Calibration: where to inject, prune and exit, and how much, from data.

calibration = hidrop_fx.calibrate(model, batches)
schedule = calibration.schedule(average_vision_tokens=64)
"""

from hidrop_fx.analysis.calibration.calibration import Calibration, Decision, Score
from hidrop_fx.analysis.calibration.run import calibrate

__all__ = ["Calibration", "Decision", "Score", "calibrate"]
