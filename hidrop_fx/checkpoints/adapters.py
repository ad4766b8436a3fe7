"""LoRA adapters of a checkpoint, merged into the weights of its base model one tensor at a time.

    weight + scale * lora_B @ lora_A            # in fp32; scale = lora_alpha / r

As PEFT's `merge_and_unload`, without the model in memory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hidrop_fx.checkpoints.original_config import read_json
from hidrop_fx.checkpoints.routes import route
from hidrop_fx.checkpoints.weight_files import Entry, file_entries, opened
from hidrop_fx.errors import HidropError

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINABLES = ("non_lora_trainables.bin", "mm_projector.bin")
"""What is trained beside the adapters; or the projector alone, in LLaVA's first stage."""
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Options of LoraConfig that change what is added, and their values that do not.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
}


@dataclass(frozen=True)
class Adapters:
    """The two factors of what is added to a weight, by the weight's place in the model."""

    factors: Mapping[str, tuple[Entry, Entry]]
    """Place -> lora_A [r, in], lora_B [out, r]."""
    scale: float

    def merged(self, place: str, weight: Tensor) -> Tensor:
        """Return a weight with what its adapter adds, in fp32; or the weight, where it has none."""
        found = self.factors.get(place)
        if found is None:
            return weight
        down, up = (_read(entry).float() for entry in found)
        return weight.float() + self.scale * (up @ down)


def find_adapters(directory: Path) -> Adapters | None:
    """Find the LoRA adapters of a checkpoint; None if it has none.

    Raises:
        HidropError: they are of another kind, or one lacks its other factor.
    """
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        if (directory / CONFIG).is_file():
            raise HidropError(f"{directory} has {CONFIG} and none of {', '.join(FILES)}")
        return None
    config = read_json(directory / CONFIG, "it says how the adapters are scaled")
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise HidropError(
                f"{directory / CONFIG}: {key}={config[key]!r} cannot be merged here; merge it with PEFT, and import what it "
                "saves"
            )
    halves: dict[str, dict[str, Entry]] = {}
    for key, entry in file_entries(path).items():
        match = _KEY.fullmatch(key)
        place = None if match is None else route(f"{match[1]}.weight")
        if match is None or place is None:
            raise HidropError(f"{path} holds {key!r}, which is no factor of a LoRA adapter")
        halves.setdefault(place, {})[match[2]] = entry
    lone = next((found for found in halves.values() if len(found) == 1), None)
    if lone is not None:
        raise HidropError(
            f"{path} holds {next(iter(lone.values())).key!r} without its other factor"
        )
    rank, alpha = (_number(directory / CONFIG, config, key) for key in ("r", "lora_alpha"))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapters({place: (found["A"], found["B"]) for place, found in halves.items()}, scale)


def find_trainables(directory: Path) -> dict[str, Entry]:
    """Find the tensors that a checkpoint of adapters holds whole, by the original model's keys."""
    found: dict[str, Entry] = {}
    for name in TRAINABLES:
        if (directory / name).is_file():
            entries = file_entries(directory / name)
            keys = [key.removeprefix("base_model.") for key in entries]
            if any(key.startswith("model.model.") for key in keys):
                keys = [key.removeprefix("model.") for key in keys]
            found |= {
                key: Entry(entry.path, entry.key, entry.shape)
                for key, entry in zip(keys, entries.values(), strict=True)
            }
    return found


def check_adapters(adapters: Adapters, entries: Mapping[str, Entry]) -> None:
    """Raise `HidropError` unless each adapter has a weight, of its shape, to be added to."""
    for place, (down, up) in adapters.factors.items():
        weight = entries.get(place)
        if weight is None:
            raise HidropError(
                f"{down.path}: {down.key!r} adapts {place!r}, which the base model does not have"
            )
        if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            raise HidropError(
                f"{down.path}: {down.key!r} is {list(down.shape)} and its other factor {list(up.shape)}, and the weight that they "
                f"adapt in {weight.path} is {list(weight.shape)}"
            )


def _number(path: Path, config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise HidropError(
            f"{path}: {key}={value!r}: adapters are scaled by lora_alpha / r, two numbers above 0; write what they were trained with"
        )
    return float(value)


def _read(entry: Entry) -> Tensor:
    with opened(entry.path) as file:
        return file.tensor(entry.key)
