"""Work shared out among processes: order, one set of results, an error of one that ends all.

Threads over one store stand for processes; torchrun's own are in `tests/cli/test_several_processes.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hidrop_fx.distributed import processes as module
from hidrop_fx.distributed.processes import Processes, joined, take_own_gpu
from hidrop_fx.errors import HidropError


def together(count: int, run: Callable[[Processes], Any]) -> list[Any]:
    """Run a function in threads over one store, as `joined` would; return what each returned or raised, by rank."""
    store = torch.distributed.HashStore()
    found: list[Any] = [None] * count

    def one(rank: int) -> None:
        own = Processes(rank, count, store)
        try:
            found[rank] = run(own)
            own.leave()
        except BaseException as error:
            own.fail(error)
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pieces", [0, 1, 2, 7])
def test_each_piece_is_done_once_and_its_result_comes_to_the_first(count: int, pieces: int) -> None:
    done: list[tuple[int, int]] = []
    come: dict[int, Any] = {}

    def run(processes: Processes) -> None:
        def work(piece: int) -> dict[str, int]:
            time.sleep(0.005 * processes.rank)
            done.append((processes.rank, piece))
            return {"square": piece * piece}

        def received(place: int, result: Any) -> None:
            assert processes.is_first
            assert place not in come
            come[place] = result

        for offset in (0, 100):  # a second round has results of its own
            if processes.is_first:
                come.clear()
            processes.share_out([offset + i for i in range(pieces)], work, received)
            if processes.is_first:
                assert come == {i: {"square": (offset + i) ** 2} for i in range(pieces)}
            processes.told(lambda: None)  # the first has seen all

    assert together(count, run) == [None] * count
    assert sorted(piece for _, piece in done) == sorted([*range(pieces), *range(100, 100 + pieces)])
    assert all(piece % 100 % count == rank for rank, piece in done)


def test_all_are_told_what_the_first_works_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5)

    def run(processes: Processes) -> Any:
        value = processes.told(lambda: {"rank": processes.rank, "list": [1, None]})
        data = processes.handed(lambda: b"%d:twelve bytes" % processes.rank)
        return value, data, processes.handed(bytes), processes.own(range(5))

    for rank, found in enumerate(together(3, run)):
        own = list(range(rank, 5, 3))
        assert found == ({"rank": 0, "list": [1, None]}, b"0:twelve bytes", b"", own)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_all_with_it(failing: int) -> None:
    done: list[int] = []

    def run(processes: Processes) -> None:
        def work(piece: int) -> int:
            if processes.rank == failing and piece >= 4:
                raise ValueError("row 4\nis broken")
            time.sleep(0.01)
            done.append(piece)
            return piece

        processes.share_out(list(range(10_000)), work, lambda *_: None)

    found = together(2, run)
    assert isinstance(found[failing], ValueError)
    other = found[1 - failing]
    assert isinstance(other, HidropError)
    assert str(other) == (
        f"process {failing} failed: ValueError: row 4 is broken; so process {1 - failing} ends, too"
    )
    assert len(done) < 1000


def test_one_that_waits_for_the_first_ends_with_its_error() -> None:
    def run(processes: Processes) -> None:
        processes.handed(lambda: b"".join([1]))  # type: ignore[list-item]

    first, second = together(2, run)
    assert isinstance(first, TypeError)
    assert "process 0 failed: TypeError" in str(second)


def test_one_process_alone_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    come: dict[int, Any] = {}
    with joined() as processes:
        assert (processes.rank, processes.world_size, processes.is_first) == (0, 1, True)
        processes.share_out("ab", str.upper, come.__setitem__)
    assert come == {0: "A", 1: "B"}
    with pytest.raises(KeyError), joined():
        raise KeyError("its own")


@pytest.mark.parametrize(
    ("listed", "number", "device", "seen"),
    [
        (None, 2, None, "2"),
        ("4,5,6", 2, "cuda", "6"),
        ("4,5,6", 2, "cuda:1", "4,5,6"),
        ("4,5,6", 2, "cpu", "4,5,6"),
        ("", 1, None, ""),
    ],
)
def test_each_process_sees_its_own_gpu(
    listed: str | None,
    number: int,
    device: str | None,
    seen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "a"), ("LOCAL_RANK", str(number))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    take_own_gpu(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "a"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(HidropError, match="process 2 of this machine has no GPU"):
        take_own_gpu(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    take_own_gpu(None)  # started alone
