"""Answer many questions under a schedule, in all processes that torchrun started, compiled once for all of them.

with joined() as processes:
    compile_once(prompt, options, processes, lambda: answers_to(...))
    processes.share_out(batches, answer, received)
"""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.data.records import Record
from hidrop_fx.cli.options import PromptOptions
from hidrop_fx.cli.prompts import LoadedPrompt, compile_prompt
from hidrop_fx.distributed.processes import Processes
from hidrop_fx.errors import HidropError

logger = logging.getLogger("hidrop_fx")


def load_everywhere(options: PromptOptions, schedule: str, processes: Processes) -> LoadedPrompt:
    """Load the model in each process, with a prompt still to be made.

    Raises:
        HidropError: loading fails, or processes came to devices of different kinds.
    """
    from hidrop_fx.demo import MODEL_DIR
    from hidrop_fx.models.loading import load_model

    model, processor = load_model(
        MODEL_DIR if options.model is None else options.model,
        device=options.device,
        dtype=options.dtype,
        attention=options.attn_implementation,
    )
    kind = processes.told(lambda: model.device.type)
    if model.device.type != kind:
        raise HidropError(
            f"process {processes.rank} is on {model.device.type}, and the first on {kind}: start as many processes as there are "
            "GPUs (torchrun --nproc-per-node), or pass --device"
        )
    return LoadedPrompt(
        model=model,
        processor=processor,
        inputs={},
        name="shipped" if options.model is None else options.model,
        images=(),
        question="",
        schedule=schedule,
    )


def compile_once(
    prompt: LoadedPrompt,
    options: PromptOptions,
    processes: Processes,
    first: Callable[[], object] | None,
) -> None:
    """Compile a model, in the first process, and load there what it generated in the others.

    Args:
        prompt: with the schedule as text.
        options: `schedule` as the user gave it, which may name a saved one.
        first: makes the first calls, which compile; None in a process without any. The first process has some.
    """
    compile_prompt(prompt, options)
    if processes.is_first:
        before = _compilations(prompt.model)
        if first is not None:
            first()
        made = _compilations(prompt.model) > before
        processes.handed(
            lambda: _code_of(prompt.model) if made and processes.world_size > 1 else b""
        )
        return
    code = processes.handed(bytes)
    if code:
        _load(prompt.model, code)
    if first is not None:
        first()


def answers_to(
    model: Any, processor: Any, records: Sequence[Record], max_new_tokens: int
) -> tuple[list[str], float, dict[str, Any]]:
    """Answer a batch of questions greedily; return the answers, the seconds of `generate`, and the inputs."""
    import torch

    from hidrop_fx.models.prompts import chat_batch, greedy_answers, open_image

    asked = [
        (
            [open_image(one) if isinstance(one, Path) else one for one in record.images],
            record.prompt,
        )
        for record in records
    ]
    inputs = chat_batch(model, processor, asked)
    started = time.perf_counter()
    texts = greedy_answers(model, processor, inputs, max_new_tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return texts, time.perf_counter() - started, inputs


def in_batches(items: Sequence[Any], size: int) -> list[Any]:
    """Cut a sequence into batches; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def progress_bar(total: int, processes: Processes, *, as_json: bool, done: int = 0) -> Any:
    """Return a bar on stderr, in the first process alone; with --json none but on a terminal."""
    import sys

    from tqdm import tqdm

    hidden = not processes.is_first or (as_json and not sys.stderr.isatty())
    return tqdm(total=total, initial=done, unit="question", disable=hidden, file=sys.stderr)


def _compilations(model: Any) -> int:
    from hidrop_fx.runtime.hf.binding import require_runtime

    return len(require_runtime(model, "").programs.log.entries)


def _code_of(model: Any) -> bytes:
    """Return the code that was generated for a model; none, with a log line, where its backend or a fallback has none."""
    from hidrop_fx.runtime.artifacts import save_compiled
    from hidrop_fx.runtime.hf.binding import require_runtime

    if require_runtime(model, "").options.backend != "inductor":
        return b""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        try:
            save_compiled(model, path)
        except HidropError as error:
            logger.warning("each process compiles for itself: %s", error)
            return b""
        return path.read_bytes()


def _load(model: Any, code: bytes) -> None:
    from hidrop_fx.runtime.artifacts import load_compiled

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(code)
        load_compiled(model, path)
