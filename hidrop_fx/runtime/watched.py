"""Thousands of names and what each is bound to, compared in C.

watched = Watched()
watched.mapping(module.__dict__, ["scaling", "forward"])
watched.unchanged()             # whether every name still means the same
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""Types whose values are compared; objects of all others are compared by identity."""


class Watched:
    """Values by name in dictionaries, containers, cells and functions, as they were when each was added.

    A prompt should not wait for every attribute of four hundred modules to be looked at one by one:
    as long as each is the very object that it was, no Python code runs.
    """

    def __init__(self) -> None:
        self._getters: list[Callable[[Any], Sequence[Any]]] = []
        self._owners: list[Any] = []
        self._values: list[Any] = []
        self._sized: list[Collection[Any]] = []
        self._sizes: list[int] = []

    def mapping(self, live: Mapping[Any, Any], names: Sequence[Any], *, whole: bool = True) -> None:
        """Watch names of a dictionary; if `whole`, others that come or go count too."""
        if whole:
            self._sized.append(live)
            self._sizes.append(len(live))
        if names:
            # A getter of one name alone would give its bare value.
            self._add(itemgetter(*names, names[0]), live)

    def attributes(self, owner: Any, names: Sequence[str]) -> None:
        """Watch attributes of an object."""
        self._add(attrgetter(*names, names[0]), owner)

    def elements(self, container: Collection[Any]) -> None:
        """Watch the elements of a list, a set or the like."""
        self._sized.append(container)
        self._sizes.append(len(container))
        if container:
            self._add(tuple, container)

    def unchanged(self) -> bool:
        """Return True if every name is bound to the same object, or to a plain value that is equal."""
        if list(map(len, self._sized)) != self._sizes:
            return False
        try:
            found = chain.from_iterable(map(call, self._getters, self._owners))
            if all(map(is_, found, self._values)):
                return True
            found = chain.from_iterable(map(call, self._getters, self._owners))
            return all(map(_same, found, self._values))
        except (KeyError, AttributeError, ValueError, RuntimeError):
            return False  # a name is gone, a cell is empty, or a container changes meanwhile

    def _add(self, getter: Callable[[Any], Sequence[Any]], owner: Any) -> None:
        self._getters.append(getter)
        self._owners.append(owner)
        self._values += getter(owner)


def _same(now: Any, before: Any) -> bool:
    kind = type(now)
    return now is before or (kind is type(before) and kind in PLAIN and now == before)
