"""The schedules of a model, and what they learned, in two small files beside its own.

    hidrop.json          the schedules by name, the default one first; the versions
    hidrop.safetensors   the pruning ratios, where a schedule learns them

The model's weights and config stay those of the original class, and load without this package.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hidrop_fx.distributed.agreement import check_presence
from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.version import __version__

SCHEDULE_FILE = "hidrop.json"
RATIOS_FILE = "hidrop.safetensors"


DEFAULT = "default"
"""Name of the schedule of a model that has one alone."""

Contents = Mapping[str, tuple[Schedule, Ratios | None]]
"""Schedules and what they learned, by name, the default one first."""


def write_sidecar(directory: str | Path, contents: Contents) -> None:
    """Write both files into `directory`, which is made if need be.

    "schedule" is the default one, so that versions which know of one alone read that. Where ratios are sharded, every process
    calls this or `gather_ratios`, and the first writes.
    """
    directory = Path(directory)
    learned = _named({name: ratios for name, (_, ratios) in contents.items()})
    whole = gather_ratios(contents)
    values = {key: whole[id(r)][r.layers.index(k)].clone() for key, (r, k) in learned.items()}
    if not writes(contents):
        return
    directory.mkdir(parents=True, exist_ok=True)
    names = list(contents)
    several = {name: schedule.to_dict() for name, (schedule, _) in contents.items()}
    content = {
        "schedule": several[names[0]],
        **({} if names == [DEFAULT] else {"schedules": several}),
        "hidrop_fx": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    (directory / SCHEDULE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    if not learned:
        (directory / RATIOS_FILE).unlink(missing_ok=True)  # of a schedule saved here before
    else:
        save_file(values, directory / RATIOS_FILE)


def gather_ratios(contents: Contents) -> dict[int, Tensor]:
    """Return the ratios of all schedules on the CPU, by the id of their module.

    A collective where an engine shards them and `gather_sharded` was not called behind the last step.

    Raises:
        HidropError: the other processes do not gather them.
    """
    found = {}
    for ratios in {id(of): of for _, of in contents.values() if of is not None}.values():
        if not ratios.at_hand:
            check_presence(
                ratios.mesh,
                "saves or gathers the learned ratios",
                "Call save_pretrained in every process, with is_main_process=rank == 0; a Trainer needs "
                "callbacks=[hidrop_fx.TrainerCallback()]",
            )
        found[id(ratios)] = ratios.now().cpu()
    return found


def gather_sharded(contents: Contents) -> None:
    """Gather the ratios that an engine shards, in every process, so that one of them can save without the others."""
    for _, ratios in contents.values():
        if ratios is not None:
            ratios.hold()


def writes(contents: Contents) -> bool:
    """Return True for the process that writes: any, or the first where ratios are sharded."""
    sharded = any(of is not None and of.shared for _, of in contents.values())
    return not sharded or torch.distributed.get_rank() == 0


def read_schedules(directory: str | Path) -> dict[str, Schedule]:
    """Read the schedules of a saved model by name, the default one first.

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
        content = json.loads(path.read_text())
        found = {DEFAULT: content["schedule"]}
        found = dict(content.get("schedules") or found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HidropError(
            f"{path} is not what save_pretrained wrote ({type(error).__name__}: {error}); it must be a "
            'JSON object with a "schedule"'
        ) from error
    try:
        return {name: Schedule.from_json(json.dumps(fields)) for name, fields in found.items()}
    except ScheduleError as error:
        raise ScheduleError(f"in {str(path)!r}: {error}") from error


def read_ratios(directory: str | Path, ratios: Mapping[str, Ratios | None]) -> None:
    """Set learned ratios, by the name of their schedule, to the saved ones; there may be none.

    Raises:
        HidropError: they were not saved, or for other filter layers.
    """
    learned = _named(ratios)
    if not learned:
        return
    path = Path(directory) / RATIOS_FILE
    if not path.is_file():
        raise HidropError(f"{path} does not exist: no ratios were saved there")
    names = {"" if name == DEFAULT else name for name in ratios}
    saved = {k: v for k, v in load_file(path).items() if k.rpartition(".")[0] in names}
    if saved.keys() != learned.keys():
        raise HidropError(
            f"{path} holds {sorted(saved)}, the model learns {sorted(learned)}; compile it with the "
            "schedule that was saved"
        )
    for key, (into, layer) in learned.items():
        into.set(layer, saved[key])


def _named(ratios: Mapping[str, Ratios | None]) -> dict[str, tuple[Ratios, int]]:
    """Return the ratios of all schedules and filter layers by their names in the file."""
    found = {}
    for name, of in ratios.items():
        prefix = "" if name == DEFAULT else f"{name}."
        if of is None:
            continue
        for layer in of.layers:
            found[f"{prefix}ratio_{layer}"] = of, layer
    return found
