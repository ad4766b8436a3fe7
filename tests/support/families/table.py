"""Write the tables of classes in docs/model-families.md and README.md from what the tests of families found.

HIDROP_FAMILY_RESULTS=results.jsonl pytest tests/models -m "families or not families"
python -m tests.support.families.table results.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.backbones import TEXT, tiny_backbone
from tests.support.families import CASES
from tests.support.families.reference import text_model

ROOT = Path(__file__).parents[3]
START, END = "<!-- table -->\n", "<!-- end of table -->"
BACKBONES_START, BACKBONES_END = "<!-- text models -->\n", "<!-- end of text models -->"
IDENTITY, SCHEDULES, TRAINING, SAVING = (
    "test_the_identity_is_hugging_face",
    "test_a_schedule_is_the_reference",
    "test_a_training_step_is_the_reference",
    "test_saved_and_loaded_it_answers_alike",
)
BACKBONE = "test_a_backbone_equals_transformers_and_its_own_layers"
BACKBONE_TRAINING = "test_a_training_step_over_a_backbone_equals_its_own_layers"
RUNS = {SCHEDULES: 2}
"""Times that a test runs for a class, where it is not once."""

Found = Mapping[tuple[str, str], list[str]]


def outcomes(results: Path) -> Found:
    """Outcomes of each run by the test and the name of the class or text model."""
    runs: dict[tuple[str, str], dict[str, str]] = {}
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        name = entry["given"].rsplit("-", 1)[-1]
        runs.setdefault((entry["test"], name), {})[entry["given"]] = entry["outcome"]
    return {key: list(found.values()) for key, found in runs.items()}


def mark(found: Found, test: str, name: str, yes: str = "yes") -> str:
    """What a cell says of the runs of a test."""
    got, wanted = found.get((test, name), []), RUNS.get(test, 1)
    if "failed" in got:
        return "no"
    return yes if len(got) == wanted else f"{len(got)} of {wanted} run" if got else "not run"


def classes(found: Found) -> str:
    """A class a row."""
    lines = [
        "| class | text model | images | several | videos | generate | training | save and load | events |"
    ]
    lines.append("|---" * 9 + "|")
    for name, case in CASES.items():
        model = case.make()
        holds = mark(found, IDENTITY, name)
        cells = [
            f"`{type(model).__name__}`",
            f"`{type(text_model(model)).__name__}`",
            holds,
            holds,
            holds if case.videos else "-",
            holds,
            mark(found, TRAINING, name),
            mark(found, SAVING, name),
            mark(found, SCHEDULES, name, "inject, prune, exit"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text_models(found: Found) -> str:
    """A text model under LLaVA a row."""
    lines = ["| text model | as | generate, events | training |", "|---|---|---|---|"]
    for name in TEXT:
        text = type(tiny_backbone(name).get_decoder()).__name__
        marks = [mark(found, BACKBONE, name), mark(found, BACKBONE_TRAINING, name)]
        lines.append(f"| `{text}` | {name} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def overview(found: Found) -> str:
    """What README.md says: every class and text model of which all runs passed, by what it takes."""
    rows: dict[str, dict[str, None]] = {"images and videos": {}, "images": {}}
    for name, case in CASES.items():
        if all(
            mark(found, test, name) == "yes" for test in (IDENTITY, SCHEDULES, TRAINING, SAVING)
        ):
            short = type(case.make()).__name__.removesuffix("ForConditionalGeneration")
            rows["images and videos" if case.videos else "images"][short] = None
    texts = [
        type(tiny_backbone(name).get_decoder()).__name__.removesuffix("Model")
        for name in TEXT
        if all(mark(found, test, name) == "yes" for test in (BACKBONE, BACKBONE_TRAINING))
    ]
    rows["text models under LLaVA"] = dict.fromkeys(texts)
    lines = ["| takes | `...ForConditionalGeneration` |", "|---|---|"]
    lines += [f"| {takes} ({len(names)}) | {', '.join(names)} |" for takes, names in rows.items()]
    return "\n".join(lines) + "\n"


def written(page: str, start: str, end: str, table: str) -> str:
    """A page with the table between its two marks."""
    before, rest = page.split(start)
    return before + start + table + end + rest.split(end)[1]


if __name__ == "__main__":
    found = outcomes(Path(sys.argv[1]))
    page = ROOT / "docs" / "model-families.md"
    text = written(page.read_text(), START, END, classes(found))
    page.write_text(written(text, BACKBONES_START, BACKBONES_END, text_models(found)))
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), START, END, overview(found)))
