"""The modules that a model was compiled with, in files beside its own.

hidrop.json                  "modules": {"twig": [2, 3, 4]}, the places that the layers of a branch were made for;
                             null for a module that is no list of layers, which is to be given again
hidrop_modules.safetensors   their weights
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hidrop_fx.capture.twin import layer_index
from hidrop_fx.errors import HidropError
from hidrop_fx.training.sidecar import SCHEDULE_FILE

MODULES_FILE = "hidrop_modules.safetensors"
_KEY = "modules"


def write_modules(directory: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Add modules to what `write_sidecar` wrote into a directory.

    Raises:
        HidropError: `fully_shard` shards one.
    """
    directory = Path(directory)
    if not modules:
        (directory / MODULES_FILE).unlink(missing_ok=True)  # of what was saved here before
        return
    for name, module in modules.items():
        if any(hasattr(value, "full_tensor") for value in module.parameters()):
            raise HidropError(
                f"the module {name!r} is sharded by fully_shard, and is not saved in parts; leave it whole: "
                "fully_shard(model, ignored_params=set(model.hidrop_modules.parameters()))"
            )
    values = {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }
    write_values(directory, {name: _places(module) for name, module in modules.items()}, values)


def write_values(
    directory: Path, places: Mapping[str, list[int] | None], values: Mapping[str, Tensor]
) -> None:
    """Add the weights of modules, as "name.key", to what `write_sidecar` wrote into a directory."""
    path = directory / SCHEDULE_FILE
    content = json.loads(path.read_text())
    content[_KEY] = dict(places)
    path.write_text(json.dumps(content, indent=2) + "\n")
    save_file({key: value.contiguous() for key, value in values.items()}, directory / MODULES_FILE)


def saved_places(directory: str | Path) -> dict[str, list[int] | None]:
    """Read the places in the decoder that the layers of each saved module were made for; None for one that is no list of layers."""
    content = json.loads((Path(directory) / SCHEDULE_FILE).read_text())
    return dict(content.get(_KEY, {}))


def read_modules(directory: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Set the parameters of modules to the saved ones; there may be none.

    Raises:
        HidropError: other modules were saved, or of other shapes.
    """
    path, places = Path(directory) / MODULES_FILE, saved_places(directory)
    if not places:
        return
    if not path.is_file():
        raise HidropError(
            f"{path} does not exist: the modules of {SCHEDULE_FILE} were not saved there"
        )
    values = load_file(path)
    for name in [name for name in places if name in modules]:
        own = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
        try:
            modules[name].load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise HidropError(
                f"{path} holds another {name!r} than the model has ({reason}); leave modules out of the call to make it "
                "as it was saved"
            ) from error


def _places(module: nn.Module) -> list[int] | None:
    if not isinstance(module, nn.ModuleList):
        return None
    found = enumerate(module.children())
    return [k if at is None else at for k, at in ((k, layer_index(each)) for k, each in found)]
