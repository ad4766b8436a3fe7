"""`compare`: is the compiled model right, and if not, from which layer on?

    found = hidrop_fx.compare(model, **inputs)
    print(found)                # a line a layer, the first that departs named
    found.first                 # None if nothing does

The reference is transformers' own forward where the schedule is the identity, else a plain loop over
the model's own layers (`hidrop_fx.inspection.eager_loop`), in which no part of this package's graph takes
part. Then bisect: leave one thing out at a time until the difference is gone.

    switch                         what it rules out if the difference stays
    backend="aot_eager"            code generation by Inductor
    backend="eager"                every compiler: the fault is in a pass, or in the model's capture
    lowering="whole" / "bodies"    the sharing of layer bodies / the whole-program graph
    disable=("attention",)         the fused attention kernels
    disable=("kv_cache",)          the writing of KV buffers
    disable=("head",)              the choice of rows after the last layer
    reference="program"            the passes: both sides are the same program, one uncompiled
    Schedule()                     (compile with it) the schedule: injection, pruning and exit
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare
from hidrop_fx.inspection.differences import TOLERANCES, LayerDifference, layer_difference
from hidrop_fx.inspection.eager_loop import Events, RowStates, _layers, run_loop
from hidrop_fx.inspection.table import Printable, Table
from hidrop_fx.lowering import BACKENDS, LOWERINGS, Executable, lower
from hidrop_fx.pipeline import Output, build_program, check_optional
from hidrop_fx.program import Kind
from hidrop_fx.runtime.binding import bind, runtime_of, unbind
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.runtime import Options, Runtime

logger = logging.getLogger("hidrop_fx")

REFERENCES = ("auto", "loop", "transformers", "program")


@dataclass(frozen=True, kw_only=True)
class Comparison(Printable):
    """Two runs of one prompt, layer by layer."""

    reference: str
    """"transformers", "loop" or "program"."""
    backend: str
    lowering: str
    disabled: tuple[str, ...]
    layers: tuple[LayerDifference, ...]
    """One for each decoder layer, and one for the normalised output."""
    fallbacks: tuple[str, ...] = ()

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that departs beyond tolerance."""
        return next((layer for layer in self.layers if layer.departs), None)

    @property
    def ok(self) -> bool:
        """Whether no layer departs."""
        return self.first is None

    @property
    def tables(self) -> list[Table]:
        """What is printed, table by table."""
        return [self._verdict(), self._table()]

    def to_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold."""
        return {
            "ok": self.ok,
            "first": None if self.first is None else self.first.region,
            "reason": None if self.first is None else self.first.reason,
            "reference": self.reference,
            "backend": self.backend,
            "lowering": self.lowering,
            "disabled": list(self.disabled),
            "layers": [layer.to_dict() for layer in self.layers],
            "fallbacks": list(self.fallbacks),
        }

    def _verdict(self) -> Table:
        names = {
            "transformers": "transformers' own forward",
            "loop": "a plain loop over the model's own layers",
            "program": "the same program, uncompiled",
        }
        setting = f"backend {self.backend}, lowering {self.lowering}"
        if self.disabled:
            setting += f", without {', '.join(self.disabled)}"
        notes = [f"reference  {names[self.reference]}", f"program    {setting}"]
        if self.first is None:
            worst = max(self.layers, key=lambda layer: layer.relative)
            verdict = f"equal within tolerance; the largest difference is {worst.relative:.1e}, at {worst.region}"
        else:
            verdict = f"{self.first.region} is the first to depart: it {self.first.reason}"
        return Table(title=verdict, notes=(*notes, *self.fallbacks))

    def _table(self) -> Table:
        rows = tuple(difference_row(layer) for layer in self.layers)
        return Table(title="Hidden states that each layer hands on", columns=COLUMNS, rows=rows)


COLUMNS = ("<layer", "tokens", "missing", "added", "largest", "mean", "of scale", "<")


def difference_row(layer: LayerDifference) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    return (
        layer.region,
        *(str(n) for n in (layer.tokens, layer.missing, layer.added)),
        *(f"{x:.1e}" for x in (layer.largest, layer.mean, layer.relative)),
        "departs" if layer.departs else "",
    )


def compare(
    model: Any,
    *,
    reference: str = "auto",
    backend: str | None = None,
    lowering: str | None = None,
    disable: Collection[str] = (),
    tolerance: float | None = None,
    **inputs: Any,
) -> Comparison:
    """Hold a compiled model's prefill against an eager run of the same prompt, layer by layer.

    Args:
        model: a compiled model.
        reference: "transformers" (identity schedule only), "loop", "program", or "auto" for the
            first of these that fits.
        backend, lowering: instead of those that the model was compiled with.
        disable: passes of `hidrop_fx.pipeline.OPTIONAL` to leave out.
        tolerance: largest difference taken for rounding, as a share of the layer's largest value;
            None for 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16.
        inputs: what `model(...)` takes. Labels and caches are left out of account.

    Raises:
        HidropError: the model is not compiled, or a switch has no such setting.
    """
    bound = runtime_of(model)
    if bound is None:
        raise HidropError(
            f"this {type(model).__name__} is not compiled, so there is nothing to compare; call "
            "model = hidrop_fx.compile(model, schedule) first"
        )
    backend = bound.options.backend if backend is None else backend
    _check(backend, BACKENDS, "backend")
    _check(reference, REFERENCES, "reference")
    if lowering is not None:
        _check(lowering, LOWERINGS, "lowering")
    check_optional(disable)
    identity = bound.schedule.identity
    if reference == "auto":
        reference = "transformers" if identity else "loop"
    if reference == "transformers" and not identity:
        raise HidropError(
            f"reference='transformers' fits the identity schedule alone, and this one is {bound.schedule}; "
            "use reference='loop'"
        )
    given = {k: v for k, v in inputs.items() if k not in ("labels", "past_key_values")}
    batch = prepare(model, bound.schedule, given)
    options = Options(backend=backend, lowering=lowering or bound.options.lowering)
    run = Instrumented(model, bound, options, disable)
    states = run.states(given)
    if reference == "transformers":
        expected = _states_of_transformers(model, given, batch)
    elif reference == "loop":
        expected = run_loop(model, batch, Events.of(bound.schedule))
    else:
        plain = Instrumented(model, bound, Options(backend="eager"), disable)
        expected = plain.states(given).rows(batch.columns)
    share = TOLERANCES.get(states.hidden[0].dtype, 1e-4) if tolerance is None else tolerance
    return Comparison(
        reference=reference,
        backend=backend,
        lowering=run._lowering("prefill"),
        disabled=tuple(disable),
        layers=_differences(expected, states, batch, share),
        fallbacks=tuple(run.log.fallbacks),
    )


@dataclass(kw_only=True)
class ProgramStates:
    """What an instrumented program gave."""

    paths: list[str]
    hidden: list[Tensor]
    """For each layer [B, S, D]."""
    columns: list[Tensor]
    """For each layer [B, S]."""
    output: Tensor
    """[B, T, D], normalised."""
    output_columns: Tensor
    """[B, T]"""

    def rows(self, length: int) -> list[RowStates]:
        """The same, row by row, without invalid tokens."""
        found = []
        for row in range(len(self.output)):
            there = [columns[row] < length for columns in self.columns]
            states = RowStates(
                columns=[c[row][t] for c, t in zip(self.columns, there, strict=True)],
                hidden=[h[row][t] for h, t in zip(self.hidden, there, strict=True)],
            )
            last = torch.searchsorted(states.columns[-1], self.output_columns[row])
            full = states.hidden[-1].new_zeros(states.hidden[-1].shape)
            full[last] = self.output[row]
            states.output = full
            found.append(states)
        return found


class Instrumented(Runtime):
    """A runtime whose prefill also returns the hidden states of every layer."""

    def __init__(
        self, model: Any, bound: Runtime, options: Options, disable: Collection[str] = ()
    ) -> None:
        super().__init__(model, bound.schedule, bound.plan, options)
        self._bound = bound
        self._disable = disable
        self._states: ProgramStates | None = None
        if options == bound.options:
            self.bodies = bound.bodies  # what is compiled already is what should be checked

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any]) -> ProgramStates:
        """Run one prompt, as `generate` would."""
        self.run({**inputs, "use_cache": True}, rows="last")
        assert self._states is not None
        return self._states

    def capture(self) -> Capture:
        return self._bound.capture()

    def executable(
        self,
        capture: Capture,
        kind: Kind,
        output: Output,
        masks: tuple[str, ...] = (),
        masked: bool = False,
        states: bool = False,
    ) -> Executable:
        program = build_program(
            capture.decoder, self.plan, kind, output=output, masks=masks, disable=self._disable
        )
        layers = {f"layer_{region.layer}": region.live_out for region in program.regions}
        program.returns({**program.outputs, **layers})
        program.module.recompile()
        made = lower(
            program,
            backend=self.options.backend,
            lowering=self._lowering(kind),
            log=self.log,
            shared=self.bodies,
        )
        return _Recording(made, self)


class _Recording(Executable):
    """An executable that notes what its layers handed on."""

    def __init__(self, made: Executable, owner: Instrumented) -> None:
        super().__init__(made.program, made.top, made.bodies)
        self._owner = owner

    def __call__(self, inputs: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        outputs = super().__call__(inputs, recompute=recompute)
        regions = self.program.regions
        streams = [self.program.stream_of(region.layer).name for region in regions]
        columns = [outputs[f"columns_{name}"] for name in streams]
        wanted = inputs["output_columns"]
        hidden = outputs["hidden"]
        if hidden.shape[1] != wanted.shape[1]:  # all rows came back
            places = torch.searchsorted(columns[-1], wanted)
            hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
            outputs["hidden"] = hidden
        self._owner._states = ProgramStates(
            paths=[region.path for region in regions],
            hidden=[outputs.pop(f"layer_{region.layer}").detach() for region in regions],
            columns=columns,
            output=hidden,
            output_columns=wanted,
        )
        return outputs


def _differences(
    expected: list[RowStates], states: ProgramStates, batch: Batch, tolerance: float
) -> tuple[LayerDifference, ...]:
    def held(values: Tensor, columns: Tensor, layer: int | None, region: str) -> LayerDifference:
        return layer_difference(
            expected,
            values,
            columns,
            layer=layer,
            region=region,
            length=batch.columns,
            tolerance=tolerance,
        )

    found = [
        held(hidden, columns, layer, path)
        for layer, (hidden, columns, path) in enumerate(
            zip(states.hidden, states.columns, states.paths, strict=True)
        )
    ]
    found.append(held(states.output, states.output_columns, None, "output"))
    return tuple(found)


@torch.no_grad()
def _states_of_transformers(model: Any, inputs: Mapping[str, Any], batch: Batch) -> list[RowStates]:
    """Run the model as if it had never been compiled; it is compiled again afterwards."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    runtime = runtime_of(model)
    assert runtime is not None
    unbind(model)
    layers = _layers(model.get_decoder())
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        output = model.model(**{**inputs, "use_cache": False}).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
        bind(model, runtime)
    rows = []
    for row in range(batch.rows):
        columns = torch.cat([batch.row_columns(name, row) for name in ("text", "vision")])
        columns = columns.sort().values
        rows.append(
            RowStates(
                columns=[columns] * len(seen),
                hidden=[states[row][columns] for states in seen],
                output=output[row][columns],
            )
        )
    return rows


def _check(value: str, allowed: Collection[str], name: str) -> None:
    if value not in allowed:
        raise HidropError(f"{name}={value!r}; use one of {', '.join(allowed)}")
