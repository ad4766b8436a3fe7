"""Weights on disk, one tensor at a time: safetensors or torch's files, whole or in shards.

    weights = find_weights(directory)
    for key, entry in weights.items():
        entry.shape
        with opened(entry.path) as file:
            file.tensor(entry.key)

Nothing is read before `tensor`: safetensors are read by key, and torch's files are mapped into memory.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hidrop_fx.checkpoints.original_config import read_json
from hidrop_fx.errors import HidropError

KINDS: tuple[tuple[str, str], ...] = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Name and suffix of weight files, the preferred first."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class Entry:
    """One tensor of one file."""

    path: Path
    key: str
    shape: tuple[int, ...]


class WeightFile(Protocol):
    """An open file of tensors."""

    def names(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def tensor(self, key: str) -> Tensor: ...


def find_weights(directory: Path) -> dict[str, Entry]:
    """Find the tensors of a model's directory, by their keys.

    Raises:
        HidropError: there are no weight files, or a shard is missing, or one lacks a key that the index names.
    """
    for stem, suffix in KINDS:
        index = directory / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index)
        files = sorted(directory.glob(f"{stem}{suffix}")) or _shards(directory, stem, suffix)
        if files:
            return {k: entry for path in files for k, entry in file_entries(path).items()}
    names = " or ".join(f"{stem}{suffix}" for stem, suffix in KINDS)
    raise HidropError(f"{directory} holds no weights: neither {names}, nor their shards")


def file_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file, by their keys.

    Raises:
        HidropError: it cannot be read, or holds more than tensors.
    """
    with opened(path) as file:
        return {key: Entry(path, key, file.shape(key)) for key in file.names()}


@contextmanager
def opened(path: Path) -> Iterator[WeightFile]:
    """Open a file of tensors, on the CPU.

    Raises:
        HidropError: it cannot be read, or holds more than tensors.
    """
    if path.suffix != ".safetensors":
        yield _TorchFile(path, _load(path))
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield _Safetensors(file)
    except SafetensorError as error:
        raise HidropError(f"{path} cannot be read: {error}") from error


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        found: Tensor = self._file.get_tensor(key)
        return found


class _TorchFile:
    def __init__(self, path: Path, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise HidropError(f"{path} holds a {type(values).__name__}; a state dict is expected")
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise HidropError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
        self._values: Mapping[str, Tensor] = values

    def names(self) -> list[str]:
        return list(self._values)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._values[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self._values[key].detach()


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HidropError(
            f"{path} cannot be read as tensors alone (weights_only=True): {reason}"
        ) from error


def _indexed(index: Path) -> dict[str, Entry]:
    places = read_json(index, "an index").get("weight_map")
    if not isinstance(places, dict):
        raise HidropError(f"{index} has no weight_map")
    files: dict[str, dict[str, Entry]] = {}
    for key, name in places.items():
        if name in files:
            continue
        path = index.parent / str(name)
        if not path.is_file():
            raise HidropError(f"{path} does not exist: {index.name} says that it holds {key!r}")
        files[name] = file_entries(path)
    for key, name in places.items():
        if key not in files[name]:
            raise HidropError(f"{index.parent / name} does not hold {key!r}, as {index.name} says")
    found = {key: entry for entries in files.values() for key, entry in entries.items()}
    return found | {key: files[name][key] for key, name in places.items()}


def _shards(directory: Path, stem: str, suffix: str) -> list[Path]:
    """Return shards that no index lists; all that their names count must be there."""
    found = {}
    for path in directory.glob(f"{stem}-*{suffix}"):
        match = _SHARD.search(path.stem)
        if match is not None:
            found[int(match[1])] = path, int(match[2])
    count = max((of for _, of in found.values()), default=0)
    missing = [k for k in range(1, count + 1) if k not in found]
    if missing:
        raise HidropError(
            f"{directory / f'{stem}-{missing[0]:05d}-of-{count:05d}{suffix}'} does not exist: the names of the other shards count it"
        )
    return [found[k][0] for k in sorted(found)]
