"""The side branch of TwigVLM, which its authors train and save beside the model: decoder layers, numbered from 0.

model.layers.0.<name>           # of a directory of its own; the branch's norm and head are for drafting alone
model.twig_layers.0.<name>      # or within the model's own weights
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hidrop_fx.checkpoints.routes import TEXT, TWIG, Shape
from hidrop_fx.checkpoints.weight_files import Entry, find_weights, opened
from hidrop_fx.errors import HidropError
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.saved_modules import write_values

_LAYERS = "model.layers."
_FIRST = f"{TEXT}{_LAYERS}0."


def find_twig(directory: Path) -> dict[str, Entry]:
    """Find the layers of a branch in a directory of its own, as "twig.0.<name>".

    Raises:
        HidropError: there are none.
    """
    found = {
        TWIG + key.removeprefix(_LAYERS): entry
        for key, entry in find_weights(directory).items()
        if key.startswith(_LAYERS)
    }
    if not found:
        raise HidropError(
            f"{directory} holds no key that begins with {_LAYERS!r}: it is no side branch"
        )
    return found


def check_twig(entries: Mapping[str, Entry], expected: Mapping[str, Shape]) -> int:
    """Return how many layers a branch has.

    Raises:
        HidropError: they are not layers of this model, or one lacks a tensor.
    """
    layer = {k.removeprefix(_FIRST): shape for k, shape in expected.items() if k.startswith(_FIRST)}
    count = len({place.split(".")[1] for place in entries})
    wanted = {f"{TWIG}{k}.{name}": shape for k in range(count) for name, shape in layer.items()}
    for place, entry in entries.items():
        if wanted.get(place) != entry.shape:
            was = list(wanted[place]) if place in wanted else "not there"
            raise HidropError(
                f"{entry.path}: {entry.key!r} has shape {list(entry.shape)}; in a branch of {count} layers of this model it is {was}"
            )
    missing = next((place for place in wanted if place not in entries), None)
    if missing is not None:
        path = next(iter(entries.values())).path
        raise HidropError(f"{path} holds no weights for {missing!r} of the side branch")
    return count


def write_twig(
    directory: Path, entries: Mapping[str, Entry], count: int, schedule: Schedule
) -> None:
    """Write a branch beside a model, for `hidrop_fx.load`; it grows at the schedule's filter layer."""
    first = next(iter(schedule.prune))
    values: dict[str, Tensor] = {}
    for place, entry in entries.items():
        with opened(entry.path) as file:
            values[place] = file.tensor(entry.key).clone()
    write_values(directory, {"twig": [*range(first, first + count)]}, values)
