"""`hidrop eval --tasks`: lmms-eval, started with the model `hidrop` once for each schedule."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from hidrop_fx.cli.evaluation_options import EvaluationOptions
from hidrop_fx.errors import HidropError
from hidrop_fx.evaluation.lmms_plugin import MODEL

_BATCH_SIZE = 8


def hand_over(options: EvaluationOptions) -> None:
    """Run lmms-eval's tasks under each schedule, one after the other; results go to --output.

    Raises:
        HidropError: lmms-eval is missing, an option is one of the other questions', or a run ended without results.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise HidropError(
            "--tasks runs lmms-eval, which is not installed: pip install 'hidrop-fx[eval]'"
        )
    others = {
        "--data": options.data,
        "--images": options.images,
        "--prompts": options.prompts,
        "--method": options.methods,
        "--budget": options.budgets,
    }
    given = [name for name, value in others.items() if value]
    if given:
        raise HidropError(
            f"{', '.join(given)} and --tasks: tasks of lmms-eval bring their own questions; choose by --schedule, once or more"
        )
    for schedule in options.schedules or (None,):
        before = _results(options.output)
        done = subprocess.run(command(options, schedule))
        written = _results(options.output) != before or not _is_first()
        if done.returncode or not written:
            failed = "failed behind its results" if written else "wrote no results"
            raise HidropError(
                f"lmms-eval {failed} of {options.tasks} under {schedule or 'no schedule'} to {options.output} (exit code "
                f"{done.returncode}): its own message stands above"
            )


def command(options: EvaluationOptions, schedule: str | None) -> list[str]:
    """Return the command of one run."""
    arguments = {
        "pretrained": options.model,
        "schedule": None if schedule is None else schedule.replace(",", ";"),
        "backend": options.backend,
        "dtype": options.dtype,
        "device": options.device,
        "attn_implementation": options.attn_implementation,
        "batch_size": options.batch_size or _BATCH_SIZE,
    }
    text = ",".join(f"{name}={_quoted(value)}" for name, value in arguments.items() if value)
    parts = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--model_args", text]
    parts += ["--tasks", options.tasks or "", "--output_path", str(options.output), "--log_samples"]
    if options.include_path is not None:
        parts += ["--include_path", str(options.include_path)]
    if options.samples is not None:
        parts += ["--limit", str(options.samples)]
    if options.max_new_tokens is not None:
        parts += ["--gen_kwargs", f"max_new_tokens={options.max_new_tokens}"]
    return parts


def _quoted(value: object) -> str:
    return f'"{value}"' if "," in str(value) else str(value)


def _is_first() -> bool:
    """Return True but in the other processes that torchrun started: one writes results."""
    return int(os.environ.get("RANK", 0)) == 0


def _results(output: Path) -> set[Path]:
    return set(output.rglob("*_results.json"))
