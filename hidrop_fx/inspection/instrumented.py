"""Run a compiled model so that every layer's hidden states are seen: in prefill, decode and training.

run = Instrumented(model, bound, options)
run.states(inputs)              # a prompt, as generate would run it
run.steps(4)                    # four more tokens on its cache
run.training(inputs, labels)    # loss, gradients, states
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.options import Options
from hidrop_fx.program.outputs import columns_output
from hidrop_fx.program.program import Program
from hidrop_fx.reference.rows import RowStates
from hidrop_fx.reference.training import TrainingStep, gradients
from hidrop_fx.runtime.hf.forward import forward
from hidrop_fx.runtime.output import DecoderOutput
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.runtime import Runtime


@dataclass(kw_only=True)
class ProgramStates:
    """Hidden states of an instrumented program, layer by layer."""

    paths: list[str]
    """Module path of each layer."""
    hidden: list[Tensor]
    """For each layer [B, S, D]."""
    columns: list[Tensor]
    """For each layer [B, S]."""
    output: Tensor
    """[B, T, D], normalised."""
    output_columns: Tensor
    """[B, T]"""

    def rows(self, length: int) -> list[RowStates]:
        """Return the states row by row, without invalid tokens.

        Args:
            length: columns from there on are no tokens.
        """
        found = []
        for row in range(len(self.output)):
            there = [columns[row] < length for columns in self.columns]
            states = RowStates(
                columns=[c[row][t] for c, t in zip(self.columns, there, strict=True)],
                hidden=[h[row][t] for h, t in zip(self.hidden, there, strict=True)],
            )
            chosen = self.output_columns[row] < length
            last = torch.searchsorted(states.columns[-1], self.output_columns[row][chosen])
            full = states.hidden[-1].new_zeros(states.hidden[-1].shape)
            full[last] = self.output[row][chosen]
            states.output = full
            found.append(states)
        return found


@dataclass(kw_only=True)
class DecodeSteps:
    """Tokens behind a prompt, one a row and step."""

    tokens: Tensor
    """[B, n]"""
    states: ProgramStates
    logits: Tensor
    """[B, n, V]"""


class Instrumented:
    """A model's own runtime over programs that also return the hidden states of every layer."""

    def __init__(
        self, model: Any, bound: Runtime, options: Options, disable: Collection[str] = ()
    ) -> None:
        programs = Programs(
            model, bound.plan, options, disable=disable, instrument=_return_every_layer
        )
        bound.programs.capture()
        programs.store.begin_with(bound.programs.store)
        if options == bound.options:
            programs.store.bodies = (
                bound.programs.store.bodies
            )  # what is compiled already should be checked
        self.model = model
        self.runtime = Runtime(
            model, bound.schedule, bound.plan, options, programs, ratios_at=bound.ratios_at
        )
        self.runtime.on_outputs.append(self._note)
        self._last: tuple[PreparedCall, dict[str, Tensor]] | None = None
        self._after: DecoderOutput | None = None

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any]) -> ProgramStates:
        """Run one prompt, as `generate` would."""
        self._after = self.runtime.call({**inputs, "use_cache": True}, rows="last")
        return self._noted()

    @torch.no_grad()
    def steps(self, count: int, tokens: Tensor | None = None) -> DecodeSteps:
        """Decode tokens behind the prompt of `states`.

        Args:
            count: tokens a row.
            tokens: [B, count]; None for the likeliest.
        """
        assert self._after is not None
        states, head = self._after, self.model.get_output_embeddings()
        chosen: list[Tensor] = []
        logits: list[Tensor] = []
        noted: list[ProgramStates] = []
        for step in range(count):
            token = head(states.hidden[:, -1:]).argmax(dim=-1)
            chosen.append(token if tokens is None else tokens[:, step : step + 1])
            assert states.cache is not None
            columns = states.cache.log.next_column[:, None]
            states = self.runtime.call({"input_ids": chosen[-1], "past_key_values": states.cache})
            noted.append(self._noted(columns))
            logits.append(head(states.hidden))
        self._after = states
        return DecodeSteps(
            tokens=torch.cat(chosen, dim=1), states=_joined(noted), logits=torch.cat(logits, dim=1)
        )

    def training(
        self, inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[TrainingStep, ProgramStates]:
        """Compute loss and gradients of the model's parameters, whose `grad` stays as it is."""
        with torch.enable_grad():
            given = {**inputs, "use_cache": False, "labels": labels}
            loss: Tensor = forward(self.model, self.runtime, **given).loss
            step = TrainingStep(loss=loss.detach(), gradients=gradients(self.model, loss))
            return step, self._noted()

    @property
    def last_program(self) -> Program:
        """The program that ran last."""
        assert self._last is not None
        return self._last[0].executable.program

    def decode_inputs(self) -> dict[str, Tensor]:
        """Return the inputs of the program that ran last."""
        assert self._last is not None
        return dict(self._last[0].tensors)

    def release(self) -> None:
        """Give recorded graphs and their buffers back."""
        if self.runtime.graphs is not None:
            self.runtime.graphs.release()

    def _note(self, prepared: PreparedCall, outputs: dict[str, Tensor]) -> None:
        self._last = prepared, outputs

    def _noted(self, columns: Tensor | None = None) -> ProgramStates:
        """Collect the states of the program that ran last.

        Args:
            columns: [B, 1], of the tokens of a decode step.
        """
        assert self._last is not None
        prepared, outputs = self._last
        program = prepared.executable.program
        if columns is not None:
            seen, wanted = [columns] * len(program.regions), columns
        else:
            segments = [program.segment_of(region.layer).name for region in program.regions]
            seen = [outputs[columns_output(name)] for name in segments]
            chosen = prepared.variant.output == "chosen"
            wanted = prepared.tensors["output_columns"] if chosen else seen[-1]
        return ProgramStates(
            paths=[region.path for region in program.regions],
            hidden=[outputs[f"layer_{region.layer}"].detach() for region in program.regions],
            columns=seen,
            output=outputs["hidden"].detach(),
            output_columns=wanted,
        )


def _return_every_layer(program: Program) -> None:
    layers = {f"layer_{region.layer}": region.live_out for region in program.regions}
    program.returns({**program.outputs, **layers})


def _joined(steps: list[ProgramStates]) -> ProgramStates:
    """Join decode steps into one run of several tokens."""
    layers = range(len(steps[0].paths))
    columns = torch.cat([step.output_columns for step in steps], dim=1)
    return ProgramStates(
        paths=steps[0].paths,
        hidden=[torch.cat([step.hidden[k] for step in steps], dim=1) for k in layers],
        columns=[columns for _ in layers],
        output=torch.cat([step.output for step in steps], dim=1),
        output_columns=columns,
    )
