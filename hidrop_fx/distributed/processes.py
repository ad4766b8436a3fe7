"""Share work out to the processes that torchrun started, and bring the results back in order.

    with joined() as processes:                  # one process where nothing says otherwise
        processes.share_out(batches, run, received)     # received(place, result), in the first process

Everything goes through the store that torchrun makes its processes meet at: no process group and no collective, so that
none waits for another's. A process that fails says so there, and the others end with its error where they look next.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from hidrop_fx.errors import HidropError

Work = TypeVar("Work")

_PLACE = "hidrop_fx/processes"
_FAILED, _LEFT = f"{_PLACE}/failed", f"{_PLACE}/left"
_PAUSE_SECONDS = 0.02
_CHUNK = 1 << 22
"""Bytes of a value in the store, which takes about twice that."""


class Processes:
    """The processes of a run, seen from one of them. Made by `joined`.

    Args:
        store: of `torch.distributed`; None for one process.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._number = itertools.count()

    @property
    def is_first(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def told(self, value: Callable[[], Any]) -> Any:
        """Return in all processes the JSON value that the first one works out."""
        if self.world_size == 1:
            return value()
        place = self._place()
        if self.is_first:
            found = value()
            self._store.set(place, json.dumps(found))
            return found
        return json.loads(self._get(place))

    def handed(self, data: Callable[[], bytes]) -> bytes:
        """Return in all processes the bytes that the first one makes, however many."""
        place = self._place()
        if self.world_size == 1 or self.is_first:
            made = data()
            if self.world_size > 1:
                parts = [made[at : at + _CHUNK] for at in range(0, len(made), _CHUNK)]
                for number, part in enumerate(parts):
                    self._store.set(f"{place}/{number}", part)
                self._store.set(place, str(len(parts)))
            return made
        count = int(self._get(place))
        return b"".join(self._get(f"{place}/{number}") for number in range(count))

    def own(self, work: Sequence[Work]) -> list[Work]:
        """Return the part of some work that is this process's."""
        return list(work[self.rank :: self.world_size])

    def share_out(
        self,
        work: Sequence[Work],
        run: Callable[[Work], Any],
        received: Callable[[int, Any], None],
    ) -> None:
        """Run each piece of work in one of the processes, and hand the results to the first.

        Args:
            work: the same in all processes.
            run: called with a piece; its result is a JSON value.
            received: called in the first process with the place of a piece in `work` and its result, as they come.

        Raises:
            HidropError: another process failed.
        """
        place = self._place()
        arriving = [
            iter(range(rank, len(work), self.world_size)) for rank in range(1, self.world_size)
        ]
        awaited = [next(each, None) for each in arriving]

        def look() -> None:
            for index, each in enumerate(arriving):
                while (at := awaited[index]) is not None and self._store.check([f"{place}/{at}"]):
                    received(at, json.loads(self._store.get(f"{place}/{at}")))
                    self._store.delete_key(f"{place}/{at}")
                    awaited[index] = next(each, None)

        for at in range(self.rank, len(work), self.world_size):
            self.check()
            result = run(work[at])
            if self.is_first:
                received(at, result)
                look()
            else:
                self._store.set(f"{place}/{at}", json.dumps(result))
        while self.is_first and any(at is not None for at in awaited):
            self.check()
            time.sleep(_PAUSE_SECONDS)
            look()

    def check(self) -> None:
        """Raise if a process failed.

        Raises:
            HidropError: with its error.
        """
        if self.world_size > 1 and self._store.check([_FAILED]):
            message = self._store.get(_FAILED).decode()
            raise HidropError(f"{message}; so process {self.rank} ends, too")

    def fail(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, unless another was first to."""
        if self.world_size > 1:
            text = " ".join(str(error).split())
            said = f"process {self.rank} failed: {type(error).__name__}: {text}"
            with suppress(Exception):  # the process that serves the store has gone
                self._store.compare_set(_FAILED, "", said)

    def leave(self) -> None:
        """Wait until all have come to the end: the store may live in the first process.

        Raises:
            HidropError: another process failed.
        """
        if self.world_size == 1:
            return
        self._store.add(_LEFT, 1)
        while not self._all_left():
            self.check()
            time.sleep(_PAUSE_SECONDS)
        if self.is_first:
            time.sleep(5 * _PAUSE_SECONDS)  # the others look once more

    def _all_left(self) -> bool:
        try:
            found: int = self._store.add(_LEFT, 0)
        except Exception:  # of a type that depends on the store
            if self.is_first:
                raise
            return True  # the first process served the store, and leaves last
        return found >= self.world_size

    def _place(self) -> str:
        return f"{_PLACE}/{next(self._number)}"

    def _get(self, key: str) -> bytes:
        while not self._store.check([key]):
            self.check()
            time.sleep(_PAUSE_SECONDS)
        found: bytes = self._store.get(key)
        return found


@contextmanager
def joined() -> Iterator[Processes]:
    """Yield the processes that torchrun started, of which this is one; of any other start, this one alone.

    An error in the block is told to the others.

    Raises:
        HidropError: a process failed.
    """
    processes = _processes()
    try:
        yield processes
        processes.leave()
    except BaseException as error:
        processes.fail(error)
        raise


def take_own_gpu(device: str | None) -> None:
    """Let a process that torchrun started see the GPU of its number alone, as cuda:0; call it before CUDA is used.

    Generated code names a GPU by number: so one process's serves all.

    Args:
        device: what the user asked for; a number or a CPU is left alone.

    Raises:
        HidropError: CUDA_VISIBLE_DEVICES lists fewer GPUs.
    """
    if not is_launched() or device not in (None, "cuda"):
        return
    number = int(os.environ.get("LOCAL_RANK", 0))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif listed:
        seen = listed.split(",")
        if number >= len(seen):
            raise HidropError(
                f"process {number} of this machine has no GPU: CUDA_VISIBLE_DEVICES={listed}; start as many processes, or pass "
                "--device"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number]


def is_launched() -> bool:
    """Return True if torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ


def _processes() -> Processes:
    if not is_launched():
        return Processes()
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(iter(rendezvous("env://")))
    return Processes(rank, world_size, store)
