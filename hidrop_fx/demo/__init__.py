"""A small LLaVA model that answers questions about drawn pictures, and all that made it.

The model in ``model/`` is an ordinary Hugging Face directory (``MODEL_DIR``); the schedule it was
trained to bear is ``schedule.json`` (``SCHEDULE_FILE``). ``pictures`` draws the pictures and asks
the questions, ``train`` makes the model again from nothing, ``evaluate`` measures it.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
SCHEDULE_FILE = Path(__file__).parent / "schedule.json"

__all__ = ["MODEL_DIR", "SCHEDULE_FILE"]
