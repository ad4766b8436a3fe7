"""A model's directory that appears whole or not at all, and weights that are written into it a shard at a time.

with new_directory(output) as directory:        # renamed to `output` in the end, removed on an error
    shards = Shards(directory, 2 * 10**9)
    for name, tensor in tensors: shards.add(name, tensor)
    shards.finish()
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hidrop_fx.errors import HidropError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def check_output(output: Path) -> None:
    """Raise `HidropError` if a path is taken."""
    if output.exists() and not output.is_dir():
        raise HidropError(
            f"output={str(output)!r} is a file; name a directory that does not exist yet"
        )
    if output.is_dir() and any(output.iterdir()):
        raise HidropError(
            f"output={str(output)!r} is not empty; name a directory that does not exist yet"
        )


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield a new directory beside `output`, which takes its name when the block ends, and is removed if it raises.

    Raises:
        HidropError: `output` is taken.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        check_output(output)
        made.rename(output)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def size_in_bytes(size: int | str) -> int:
    """Return a size such as "2GB", as transformers writes it, in bytes.

    Raises:
        HidropError: it is none.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B|)", str(size).strip().upper())
    if match is None or isinstance(size, bool) or int(match[1]) == 0:
        raise HidropError(f'max_shard_size={size!r} is no size; write it as "2GB", or in bytes')
    return int(match[1]) * _UNITS[match[2]]


class Shards:
    """Weights on their way to disk: at most one shard of them is in memory."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[list[str]] = []
        self.total_bytes = 0
        self.parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which is copied."""
        own = tensor.detach().contiguous().clone()
        size = own.numel() * own.element_size()
        if self._waiting and self._bytes + size > self._limit:
            self._write()
        self._waiting[name] = own
        self._bytes += size
        self.total_bytes += size
        self.parameters += own.numel()

    def finish(self) -> None:
        """Write what is left, and the index where there are several shards."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._path(0).rename(self._directory / "model.safetensors")
            return
        places = {}
        for k, names in enumerate(self._written):
            name = f"model-{k + 1:05d}-of-{count:05d}.safetensors"
            self._path(k).rename(self._directory / name)
            places.update(dict.fromkeys(names, name))
        sizes = {"total_parameters": self.parameters, "total_size": self.total_bytes}
        index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        save_file(self._waiting, self._path(len(self._written)), metadata={"format": "pt"})
        self._written.append([*self._waiting])
        self._waiting, self._bytes = {}, 0

    def _path(self, k: int) -> Path:
        return self._directory / f"shard-{k:05d}.safetensors"
