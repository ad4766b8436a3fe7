"""Replay a decode program: the compiled prompt fills a cache, then one token runs stage by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import prepare_batch
from hidrop_fx.inspection.comparison.differences import TOLERANCES, state_differences
from hidrop_fx.inspection.dumps.stage_files import LoadedStage
from hidrop_fx.inspection.instrumented import Instrumented, ProgramStates
from hidrop_fx.inspection.replays.result import StageReplay
from hidrop_fx.models import family_of
from hidrop_fx.reference.loop import Events, run_loop
from hidrop_fx.reference.rows import RowStates
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

_FILLS = "kv_cache"


@torch.no_grad()
def replay_decode(
    program: str,
    stages: Sequence[LoadedStage],
    model: Any,
    decoder: Any,
    schedule: Schedule,
    inputs: Mapping[str, Any],
    tolerance: float | None,
) -> tuple[StageReplay, ...]:
    """Compare each stage with the plain loop, from the pass on that lets attention see the cache.

    Args:
        program: name of the folder in the dump.
        stages: in the order of the passes.
        model: compiled under the dump's schedule.
        decoder: the model's, with the constants of the dump beside it.
        schedule: of the dump.
        inputs: what `model(...)` takes.
        tolerance: as for `compare`.

    Raises:
        HidropError: the model is not compiled under the dump's schedule, or these inputs lead to another
            program.
    """
    bound = _bound(model, schedule)
    options = replace(bound.options, backend="eager", cuda_graphs=False, overlap_vision=False)
    run = Instrumented(model, bound, options)
    run.states(inputs)
    step = run.steps(1)
    made = run.last_program.name
    if made != program:
        raise HidropError(
            f"these inputs lead to the program {made!r}, not {program!r} (rows of unequal length and "
            f"sliding windows take masks); replay program={made!r}, or give other inputs"
        )
    columns = step.states.output_columns
    words = family_of(model).embedded_ids(model.config, step.tokens)
    embeds = model.get_input_embeddings()(words)
    batch = prepare_batch(model, schedule, dict(inputs))
    rows = run_loop(model, batch, Events.of(batch.layout.plan), new=embeds)
    expected = [states.at(own) for states, own in zip(rows, columns, strict=True)]
    names = [stage.name for stage in stages]
    seeing = stages[names.index(_FILLS) :]
    given = run.decode_inputs()
    return tuple(_held(stage, decoder, given, expected, columns, tolerance) for stage in seeing)


def _bound(model: Any, schedule: Schedule) -> Runtime:
    bound = runtime_of(model)
    if bound is not None:
        bound = bound.under(schedule) or bound
    if bound is None or bound.schedule != schedule:
        state = "is not compiled" if bound is None else f"is compiled under {bound.schedule}"
        raise HidropError(
            f"the model {state}; a decode program goes on with the cache that a compiled prompt fills: "
            f"call hidrop_fx.compile(model, {str(schedule)!r}) first"
        )
    return bound


def _held(
    stage: LoadedStage,
    decoder: Any,
    given: Mapping[str, Tensor],
    expected: list[RowStates],
    columns: Tensor,
    tolerance: float | None,
) -> StageReplay:
    # Stages write to the buffers; captured inputs are still named, and read no more.
    inputs: dict[str, Tensor | None] = dict.fromkeys(stage.inputs)
    inputs |= {name: value.clone() for name, value in given.items()}
    try:
        run = stage.run(decoder, inputs)
    except HidropError as error:
        return StageReplay(name=stage.name, layers=(), error=str(error))
    output = run.output["hidden"] if isinstance(run.output, dict) else run.output
    share = TOLERANCES.get(output.dtype, 1e-4) if tolerance is None else tolerance
    states = ProgramStates(
        paths=[path for path, _ in stage.layers],
        hidden=run.hidden,
        columns=[columns] * len(run.hidden),
        output=output,
        output_columns=columns,
    )
    length = int(columns.max()) + 1
    layers = state_differences(expected, states, length=length, tolerance=share)
    return StageReplay(name=stage.name, layers=layers)
