"""Training under two schedules in turn, by DDP and by FSDP2 in two gloo processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.dual_cases import KINDS
from tests.distributed.test_fsdp2 import Ran, check


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_steps_and_lessons_equal_those_of_one_process(tmp_path: Path, name: str) -> None:
    ran = Ran(tmp_path, (name,), module="tests.distributed.dual_cases")
    check(ran[name])
    for found in ran[name]:
        assert found["kinds"] == KINDS
        assert found["count"] == ran[name][0]["count"] > 60
