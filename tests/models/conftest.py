"""Write down what the tests of families found, one JSON line each, where `HIDROP_FAMILY_RESULTS` names a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORDED = ("test_families.py", "test_backbones.py")


def pytest_runtest_logreport(report: Any) -> None:
    path = os.environ.get("HIDROP_FAMILY_RESULTS")
    if path and report.when == "call" and report.nodeid.split("::")[0].endswith(RECORDED):
        test, _, given = report.nodeid.split("::")[-1].partition("[")
        line = {"test": test, "given": given.rpartition("]")[0], "outcome": report.outcome}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
