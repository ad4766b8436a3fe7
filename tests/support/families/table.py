"""Write the table of classes in docs/model-families.md from what the tests of families found.

HIDROP_FAMILY_RESULTS=results.jsonl pytest tests/models -m "families or not families"
python -m tests.support.families.table results.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.families import CASES

PAGE = Path(__file__).parents[3] / "docs" / "model-families.md"
START, END = "<!-- table -->\n", "<!-- end of table -->"
TESTS = {
    "test_the_identity_is_hugging_face": "identity",
    "test_a_schedule_is_the_reference": "schedules",
    "test_a_training_step_is_the_reference": "training",
}
RUNS = {"test_a_schedule_is_the_reference": 2}
"""Times that a test runs for a class, where it is not once."""


def table(results: Path) -> str:
    """The table, a class a row."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        name = next((n for n in sorted(CASES, key=len, reverse=True) if n in entry["given"]), None)
        if name is not None and entry["test"] in TESTS:
            found.setdefault((name, entry["test"]), {})[entry["given"]] = entry["outcome"]
    lines = ["| class | text model | videos | " + " | ".join(TESTS.values()) + " |"]
    lines.append("|---" * (len(TESTS) + 3) + "|")
    for name, case in CASES.items():
        if not any(key[0] == name for key in found):
            continue
        model = case.make()
        marks = []
        for test in TESTS:
            outcomes = list(found.get((name, test), {}).values())
            wanted = RUNS.get(test, 1)
            passed = "yes" if len(outcomes) == wanted else f"{len(outcomes)} of {wanted} run"
            marks.append("no" if "failed" in outcomes else passed if outcomes else "not run")
        videos = "yes" if case.videos else "-"
        text = type(model.get_decoder()).__name__
        lines.append(f"| `{type(model).__name__}` | `{text}` | {videos} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = PAGE.read_text()
    before, rest = page.split(START)
    PAGE.write_text(before + START + table(Path(sys.argv[1])) + END + rest.split(END)[1])
