"""Run a dumped program again, stage by stage, to find the pass that made it wrong.

    print(hidrop_fx.replay("dump", model, **inputs))

Every stage file is run eagerly, without capture, passes or compiler. After each pass, every layer is held
against a plain loop over the model's own layers in which exactly those events happen that the passes
so far have carried out. So the first stage that departs is the pass at fault.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.capture.parallel_styles import check_undivided
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare_batch
from hidrop_fx.inspection.comparison.differences import (
    TOLERANCES,
    gradient_differences,
    state_differences,
    value_difference,
)
from hidrop_fx.inspection.dumps.folder import CONSTANTS
from hidrop_fx.inspection.dumps.stage_files import LoadedStage, StageRun, load_stage
from hidrop_fx.inspection.instrumented import ProgramStates, TrainingStep, gradients
from hidrop_fx.inspection.replays.decode import replay_decode
from hidrop_fx.inspection.replays.result import Replay, StageReplay
from hidrop_fx.ops.masks import MaskRule, rule_mask
from hidrop_fx.passes.branch import parameter_name
from hidrop_fx.pipeline.event_passes import EVENT_PASSES
from hidrop_fx.planning import Event, Plan
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.reference.loop import ADDING_PASSES, Events, run_loop
from hidrop_fx.reference.rows import RowStates
from hidrop_fx.reference.training import loss_of, train_loop
from hidrop_fx.runtime.call_context import filled
from hidrop_fx.runtime.given_modules import given_modules
from hidrop_fx.runtime.hf.binding import unwrapped
from hidrop_fx.runtime.prompt_output import scatter_rows
from hidrop_fx.schedule.schedule import Schedule

logger = logging.getLogger("hidrop_fx")


def replay(
    directory: str | Path,
    model: Any,
    *,
    program: str | None = None,
    tolerance: float | None = None,
    **inputs: Any,
) -> Replay:
    """Run the stages of a dumped program eagerly, and compare each with a plain loop.

    Args:
        directory: written by `dump`. Its stage files may have been edited.
        model: the model that it was made from, compiled or not; its weights are used.
        program: a folder of the dump; None takes the first prefill or train program. Decode programs run one
            token behind the prompt, from `kv_cache` on: the model must be compiled under the dump's
            schedule, and fills the cache.
        tolerance: as for `compare`.
        inputs: what `model(...)` takes. Labels count for a train program: with them, the loss and the
            gradient of every parameter are compared too, unless ratios are learned.

    Raises:
        HidropError: the directory is no dump, or has no such program.
    """
    check_undivided(unwrapped(model), "hidrop.replay")
    folder = _program_folder(Path(directory), program)
    schedule = _schedule(Path(directory) / "schedule.json")
    given = {k: v for k, v in inputs.items() if k != "past_key_values"}
    decoder = _with_constants(unwrapped(model), folder)
    stages = [load_stage(path) for path in sorted(folder.glob("[0-9][0-9]_*.py"))]
    if not folder.name.startswith("train"):
        given.pop("labels", None)
    if folder.name.startswith("decode"):
        held = replay_decode(
            folder.name, stages, unwrapped(model), decoder, schedule, given, tolerance
        )
        return Replay(program=folder.name, stages=held)
    labels = None if schedule.learns else given.get("labels")
    names = inspect.signature(type(unwrapped(model)).forward).parameters
    loss_inputs = {k: v for k, v in given.items() if k not in names}
    batch = prepare_batch(model, schedule, given, grad=labels is not None)
    if folder.name.startswith("train"):  # what it chooses, where it chooses rows, is the text
        batch = replace(batch, call=replace(batch.call, rows="text"))
    declared = _declared_inputs(batch, "train" if folder.name.startswith("train") else "prefill")
    found: list[StageReplay] = []
    expected: dict[Events, tuple[TrainingStep | None, list[RowStates]]] = {}
    for index, stage in enumerate(stages):
        events = _events_after([s.name for s in stages[: index + 1]], batch.layout.plan)
        if events not in expected:
            expected[events] = (
                (None, run_loop(model, batch, events))
                if labels is None
                else train_loop(model, batch, events, labels, loss_inputs)
            )
        step, rows = expected[events]
        with torch.set_grad_enabled(step is not None):
            replayed, full = _replayed(stage, decoder, batch, declared, rows, tolerance)
            if step is not None and labels is not None and full is not None:
                loss = loss_of(model, full, batch, labels, loss_inputs)
                replayed = _with_gradients(replayed, step, model, loss)
        found.append(replayed)
        logger.debug("replayed %s: %s", stage.path.name, "ok" if found[-1].ok else "departs")
    return Replay(program=folder.name, stages=tuple(found))


def _schedule(path: Path) -> Schedule:
    try:
        return Schedule.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HidropError(f"{path.parent} is no dump: {error}") from error


def _program_folder(directory: Path, program: str | None) -> Path:
    folders = sorted(p.parent for p in directory.glob("*/00_captured.py"))
    names = [p.name for p in folders]
    if not folders:
        raise HidropError(
            f"{directory} holds no program; write one with hidrop_fx.dump(model, dir)"
        )
    if program is None:
        return next((p for p in folders if not p.name.startswith("decode")), folders[0])
    if program not in names:
        raise HidropError(f"{directory} has no program {program!r}; it has {', '.join(names)}")
    return directory / program


def _events_after(passes: Sequence[str], plan: Plan) -> Events:
    """Return the events that these passes carry out; passes not named here change no tokens."""
    if "split_streams" not in passes:
        return Events(events=(Event(layer=0, kind="inject"),))
    done = {kind for kind, pass_fn in EVENT_PASSES.items() if pass_fn.__name__ in passes}
    events = tuple(event for event in plan.events if event.kind in done)
    found = replace(Events.of(plan), events=events, additions=ADDING_PASSES.intersection(passes))
    return found if "positions" in passes else replace(found, positions=Events.positions)


def _with_gradients(
    replayed: StageReplay, expected: TrainingStep, model: Any, loss: Tensor
) -> StageReplay:
    share = replayed.layers[0].tolerance
    found = gradients(model, loss, shared=True)
    return replace(
        replayed,
        loss=value_difference("loss", expected.loss, loss, share),
        gradients=gradient_differences(expected.gradients, found, share),
    )


def _declared_inputs(batch: Batch, kind: Kind) -> dict[str, Tensor]:
    """Fill the inputs that the programs of a kind declare, KV buffers aside, by name."""
    capture = batch.programs.capture()
    placeholders = batch.layout.needs_features and batch.deepstack is not None
    variant = Variant(output="chosen", masks=batch.call.masks, placeholders=placeholders)
    specs = batch.programs.program(capture, kind, variant, batch.layout.plan).specs.values()
    wanted = [spec for spec in specs if not spec.static]
    return filled(wanted, batch.call, batch.call.device)


def _replayed(
    stage: LoadedStage,
    decoder: Any,
    batch: Batch,
    declared: Mapping[str, Tensor],
    expected: list[RowStates],
    tolerance: float | None,
) -> tuple[StageReplay, Tensor | None]:
    """Compare a stage with the loop, and return its output at the columns of the prompt too, [B, L, D]."""
    inputs = {**declared, **_captured_inputs(batch, stage)}
    try:
        run = stage.run(decoder, inputs)
    except HidropError as error:
        return StageReplay(name=stage.name, layers=(), error=str(error)), None
    columns = run.columns or [_all_columns(batch)] * len(run.hidden)
    share = tolerance if tolerance is not None else TOLERANCES.get(run.hidden[0].dtype, 1e-4)
    output, places = _output(run, columns[-1], batch)
    states = ProgramStates(
        paths=[path for path, _ in stage.layers],
        hidden=run.hidden,
        columns=columns,
        output=output,
        output_columns=places,
    )
    with torch.no_grad():
        layers = state_differences(expected, states, length=batch.columns, tolerance=share)
    full = batch.as_given(scatter_rows(output, places, batch.columns))
    return StageReplay(name=stage.name, layers=layers), full


def _output(run: StageRun, columns: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the output of a stage, and the columns of its rows."""
    hidden = run.output["hidden"] if isinstance(run.output, dict) else run.output
    wanted = batch.call.output_columns.to(hidden.device)
    chosen = hidden.shape[1] == wanted.shape[1] != columns.shape[1]
    return hidden, wanted if chosen else columns


def _captured_inputs(batch: Batch, stage: LoadedStage) -> dict[str, Tensor | None]:
    """Compute the inputs of the captured graph: all tokens at their columns, and masks.

    Later stages still name these inputs, but read them no more, but for masks that are plain causal:
    those they get as None.
    """
    call, length = batch.call, batch.columns
    text, vision = call.text_embeds, call.vision_embeds
    assert vision is not None
    full = text.new_zeros(len(text), length + 1, text.shape[2])
    for columns, values in ((call.text_columns, text), (call.vision_columns, vision)):
        index = columns[:, :, None].expand(-1, -1, text.shape[2])
        full = full.scatter(1, index, values)
    found: dict[str, Tensor | None] = {
        "inputs_embeds": full[:, :length],
        "position_ids": call.layout.position_ids[..., :length].to(text.device),
    }
    for name in stage.inputs:
        if name == "mask" or name.startswith("mask_"):
            found[name] = _mask(batch, name) if not stage.segments else None
    return found


def _mask(batch: Batch, name: str) -> Tensor:
    length = batch.columns
    device = batch.call.device
    columns = torch.arange(length, device=device).expand(batch.rows, -1)
    rule = dict(batch.call.masks).get(name, MaskRule())
    blocks = batch.call.blocks
    blocks = blocks.to(device) if blocks is not None and rule.blocks else None
    floors = batch.call.floors.to(device) if rule.floors else None
    chunks = None if rule.chunk is None else batch.call.chunks(rule.chunk).to(device)
    visible = rule_mask(columns, blocks, rule.window, rule.blocks == "beyond", floors, chunks)
    valid = _all_columns(batch) < length
    mask = visible & valid[:, None, None, :]
    return mask | torch.eye(length, dtype=torch.bool, device=device)  # no row without a key


def _all_columns(batch: Batch) -> Tensor:
    """Return every column [B, L] of the prompt, the sentinel in place of an invalid one."""
    length = batch.columns
    text, vision = batch.call.text_columns, batch.call.vision_columns
    found = torch.full((len(text), length + 1), length, device=text.device)
    for columns in (text, vision):
        found = found.scatter(1, columns, columns)
    return found[:, :length]


class _Decoder:
    """A decoder, and constants that it does not hold."""

    def __init__(self, decoder: Any, constants: Mapping[str, Tensor]) -> None:
        self._decoder, self._constants = decoder, constants

    def __getattr__(self, name: str) -> Any:
        found = self._constants.get(name)
        return getattr(self._decoder, name) if found is None else found


def _with_constants(model: Any, folder: Path) -> Any:
    decoder, path = text_decoder(model), folder / CONSTANTS
    found = torch.load(path, weights_only=True) if path.exists() else {}
    twig = given_modules(model).get("twig")
    if twig is not None:
        layers = layer_list(decoder)[0]
        for name, value in (*twig.named_parameters(), *twig.named_buffers()):
            found[parameter_name(f"{layers}.{name}")] = value
    return _Decoder(decoder, found) if found else decoder
