"""A schedule, and what it learned, in two small files beside a model's own.

    hidrop.json          the schedule, the versions
    hidrop.safetensors   the pruning ratios, where the schedule learns them

The model's weights and config stay those of the original class, and load without this package.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.version import __version__

SCHEDULE_FILE = "hidrop.json"
RATIOS_FILE = "hidrop.safetensors"


def write_sidecar(directory: str | Path, schedule: Schedule, ratios: Ratios | None) -> None:
    """Write both files into `directory`, which is made if need be."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "schedule": schedule.to_dict(),
        "hidrop_fx": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    (directory / SCHEDULE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    if ratios is None:
        (directory / RATIOS_FILE).unlink(missing_ok=True)  # of a schedule saved here before
    else:
        values = {f"ratio_{k}": ratios[k].detach().cpu().clone() for k in ratios.layers}
        save_file(values, directory / RATIOS_FILE)


def read_schedule(directory: str | Path) -> Schedule:
    """Read the schedule of a saved model.

    Raises:
        HidropError: there is none.
        ScheduleError: it cannot be read, or names what is not registered here.
    """
    path = Path(directory) / SCHEDULE_FILE
    if not path.is_file():
        raise HidropError(
            f"{path} does not exist: the model was not saved while compiled. Compile it with its "
            "schedule instead: hidrop.compile(model, schedule)"
        )
    try:
        found = json.loads(path.read_text())["schedule"]
    except (ValueError, KeyError, TypeError) as error:
        raise HidropError(
            f"{path} is not what save_pretrained wrote ({type(error).__name__}: {error}); it must be a "
            'JSON object with a "schedule"'
        ) from error
    try:
        return Schedule.from_json(json.dumps(found))
    except ScheduleError as error:
        raise ScheduleError(f"in {str(path)!r}: {error}") from error


def read_ratios(directory: str | Path, ratios: Ratios) -> None:
    """Set learned ratios to the saved ones.

    Raises:
        HidropError: they were not saved, or for other filter layers.
    """
    path = Path(directory) / RATIOS_FILE
    if not path.is_file():
        raise HidropError(f"{path} does not exist: no ratios were saved there")
    saved = load_file(path)
    expected = {f"ratio_{layer}" for layer in ratios.layers}
    if set(saved) != expected:
        raise HidropError(
            f"{path} holds {sorted(saved)}, the model learns {sorted(expected)}; compile it with the "
            "schedule that was saved"
        )
    with torch.no_grad():
        for index, layer in enumerate(ratios.layers):
            ratios.values[index] = saved[f"ratio_{layer}"].to(ratios.values.device)
