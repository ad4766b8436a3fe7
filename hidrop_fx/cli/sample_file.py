"""The answers of an evaluation, one JSON object a line, so that an interrupted one goes on where it stopped.

file = SampleFile(directory, settings)
file.add(lines)
file.close()          # in order
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hidrop_fx.errors import HidropError

logger = logging.getLogger("hidrop_fx")

SAMPLES, SETTINGS = "samples.jsonl", "settings.json"
Key = tuple[str, str, int]


class SampleFile:
    """`samples.jsonl` in a directory, and `settings.json`, what its answers depend on.

    Args:
        directory: made if it is not there.
        settings: JSON values; those of a file that is there must be equal.

    Raises:
        HidropError: the directory holds the answers of another evaluation, or cannot be read.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.path = directory / SAMPLES
        directory.mkdir(parents=True, exist_ok=True)
        place = directory / SETTINGS
        if self.path.exists() and place.exists():
            _check_settings(place, json.loads(place.read_text()), settings)
        elif self.path.exists():
            raise HidropError(
                f"{self.path} has no {SETTINGS} beside it, which says what was asked: name another --output"
            )
        place.write_text(json.dumps(settings, indent=2) + "\n")
        self.lines: dict[Key, dict[str, Any]] = {}
        if self.path.exists():
            self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def has(self, key: Key, **asked: str | None) -> bool:
        """Return True if there is a line of a method, budget and index, with these values: what is asked today."""
        found = self.lines.get(key)
        return found is not None and all(found.get(name) == asked[name] for name in asked)

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines, and keep them even if this process is killed next."""
        for line in lines:
            self.lines[_key(line)] = line
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, order: Callable[[dict[str, Any]], Any]) -> None:
        """Write all lines anew, in order."""
        self._file.close()
        fresh = self.path.with_suffix(".new")
        lines = sorted(self.lines.values(), key=order)
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                self.lines[_key(found)] = found
            except (ValueError, KeyError, TypeError) as error:
                raise HidropError(
                    f"line {number} of {self.path} is no answer of an evaluation: {error!r}; mend it, or name another --output"
                ) from error
        if rest:
            logger.warning("%s ended within a line, which is asked again", self.path)
            self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")


def _key(line: dict[str, Any]) -> Key:
    return str(line["method"]), str(line["budget"]), int(line["index"])


def _check_settings(place: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    differing = [
        f"{name} {there.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*there, *settings})
        if there.get(name) != settings.get(name)
    ]
    if differing:
        raise HidropError(
            f"{place.parent} holds an evaluation with {'; '.join(differing)}: name another --output, or remove it"
        )
