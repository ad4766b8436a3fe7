"""The questions of `hidrop eval`, and the methods that they are put to: the lines of its table."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from hidrop_fx.analysis.data.records import Record, read_records
from hidrop_fx.cli.evaluation_options import SAMPLES, EvaluationOptions
from hidrop_fx.cli.prompts import schedule_text
from hidrop_fx.demo import SCHEDULE_FILE
from hidrop_fx.demo.equal_budgets import BUDGETS, OWN, SCHEDULES
from hidrop_fx.demo.pictures import held_out
from hidrop_fx.errors import HidropError
from hidrop_fx.schedule.schedule import Schedule

PLAIN, ALL = "vanilla", "100"
SHIPPED = "shipped"
"""The schedule that the shipped model was trained to bear."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A line of the table."""

    method: str
    budget: str
    schedule: str | None
    """As text; None for plain Hugging Face."""
    given: str | None = None
    """As the user gave it, which may be the name of one that was saved with the model."""


def questions_of(options: EvaluationOptions) -> tuple[list[Record], list[str]]:
    """Return records and the kind of each question; of drawn pictures, those of the demo's held-out ones."""
    if options.data is None:
        if options.model is not None:
            raise HidropError(
                "--data is missing: only the shipped model brings questions of its own. Pass a LLaVA-format JSON file with "
                "answers, and --images DIR"
            )
        drawn = list(itertools.islice(held_out(), options.samples or SAMPLES))
        records = [
            Record(images=(shown.image,), prompt=one.sentence, answer=one.answer)
            for shown, one in drawn
        ]
        return records, [one.kind for _, one in drawn]
    records = read_records(
        options.data,
        images=options.images,
        prompts=options.prompts,
        limit=options.samples or SAMPLES,
    )
    without = [record.prompt for record in records if not record.answer]
    if without:
        raise HidropError(
            f"{len(without)} of {len(records)} records of {options.data} have no answer, such as {without[0]!r}: answers "
            "without right ones come from hidrop run --data"
        )
    return records, ["" for _ in records]


def settings_of(options: EvaluationOptions) -> list[Setting]:
    """Return the lines of the table in order: plain Hugging Face, the table's methods, the schedules given.

    Raises:
        HidropError: a method or budget is not in the table.
    """
    chosen = [
        Setting(
            method=text,
            budget=OWN,
            schedule=_text(options.model, text),
            given=text,
        )
        for text in dict.fromkeys(options.schedules or ())
    ]
    plain = Setting(method=PLAIN, budget=ALL, schedule=None)
    table = {
        (SHIPPED, OWN): str(Schedule.parse(str(SCHEDULE_FILE))),
        **SCHEDULES,
    }
    if options.model is not None:
        if options.methods or options.budgets or not chosen:
            raise HidropError(
                "--method and --budget are those of the shipped model: with --model, pass --schedule, once or more"
            )
        return [plain, *chosen]
    methods = [PLAIN, *dict.fromkeys(method for method, _ in table)]
    budgets = list(dict.fromkeys(budget for _, budget in table))
    for asked, known, option in (
        (options.methods, methods, "--method"),
        (options.budgets, [ALL, *budgets], "--budget"),
    ):
        for name in asked or ():
            if name not in known:
                raise HidropError(f"{option} {name!r} is none of {'; '.join(known)}")
    if chosen and not (options.methods or options.budgets):
        return [plain, *chosen]
    found = [plain] if not options.methods or PLAIN in options.methods else []
    for (method, budget), text in table.items():
        usual = budget in BUDGETS or method == SHIPPED or bool(options.methods)
        if (budget in options.budgets if options.budgets else usual) and method in (
            options.methods or methods
        ):
            found.append(Setting(method=method, budget=budget, schedule=text))
    if not found and not chosen:
        raise HidropError(
            f"--method {', '.join(options.methods or ())} has no budget {', '.join(options.budgets or ())}: it has "
            + ", ".join(b for m, b in table if m in (options.methods or ()))
        )
    order = {budget: place for place, budget in enumerate((ALL, OWN, *budgets))}
    return [*sorted(found, key=lambda one: order[one.budget]), *chosen]


def _text(model: str | None, given: str) -> str:
    """Return a schedule's text, its own where a file holds it or it was saved with the model."""
    text = schedule_text(model, given) or given
    return str(Schedule.parse(text)) if Path(text).is_file() else text
