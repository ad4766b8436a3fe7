"""One case of each engine that two processes hold a model together by, in one start of both: training, answers, choices."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tests.distributed.test_fsdp2 import Ran, check

CASES = ("no_images", "grouped", "tests.distributed.divided_cases:default")
OPTIONAL = ("tests.distributed.engine_cases:accelerate",) if find_spec("accelerate") else ()


def test_training_and_answers_equal_one_process(tmp_path: Path) -> None:
    """FSDP2: learned ratios, padding, a rank without images; a unit of several layers. Tensor parallelism: learned ratios, padding, norms of heads,
    grouped heads, and tokens that each process would choose otherwise by the scores of its own heads. accelerate's FSDP2, where it is installed.
    """
    ran = Ran(tmp_path, (*CASES, *OPTIONAL))
    # Every parameter that has a gradient.
    for name, count in (("no_images", 65), ("grouped", None), ("default", 50)):
        check(ran[name])
        assert count in (None, ran[name][0]["count"])
        for found in ran[name]:
            assert found["tokens"] == found["wanted"]
    for found in ran["default"]:
        assert found["equal"]
        assert found["own_differ"]
    if OPTIONAL:
        check(ran["accelerate"])
        assert ran["accelerate"][0]["count"] == 65
