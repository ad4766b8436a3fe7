"""One case of each engine that two processes hold a model together by, in one start of both: training, answers, choices."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.test_fsdp2 import Ran, check

CASES = ("no_images", "grouped", "tests.distributed.divided_cases:default")


def test_training_and_answers_equal_one_process(tmp_path: Path) -> None:
    """FSDP2: learned ratios, padding, a rank without images; a unit of several layers. Tensor parallelism: learned ratios, padding, norms of heads,
    grouped heads, and tokens that each process would choose otherwise by the scores of its own heads.
    """
    ran = Ran(tmp_path, CASES, 240)
    # Every parameter that has a gradient.
    for name, count in (("no_images", 65), ("grouped", None), ("default", 50)):
        check(ran[name])
        assert count in (None, ran[name][0]["count"])
        for found in ran[name]:
            assert found["tokens"] == found["wanted"]
    for found in ran["default"]:
        assert found["equal"]
        assert found["own_differ"]
