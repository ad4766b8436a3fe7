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

`new_tokens=4` compares decode too; labels among the inputs compare a training step instead.
"""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare
from hidrop_fx.inspection.differences import (
    TOLERANCES,
    LayerDifference,
    ValueDifference,
    gradient_differences,
    layer_difference,
    value_difference,
    worst_of,
)
from hidrop_fx.inspection.eager_loop import Events, RowStates, _layers, run_loop
from hidrop_fx.inspection.eager_training import train_loop
from hidrop_fx.inspection.instrumented import Instrumented, ProgramStates
from hidrop_fx.inspection.table import Printable, Table
from hidrop_fx.lowering import BACKENDS, LOWERINGS
from hidrop_fx.options import Options
from hidrop_fx.packed_attention import ATTENTIONS, check_attention
from hidrop_fx.pipeline import check_optional
from hidrop_fx.runtime.binding import bind, runtime_of, unbind, unwrapped
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule import checked_int

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
    steps: tuple[LayerDifference, ...] = ()
    """Of the tokens that were decoded: one for each layer, the output and the logits."""
    loss: ValueDifference | None = None
    gradients: tuple[ValueDifference, ...] = ()
    """Of every parameter, where labels were given."""
    fallbacks: tuple[str, ...] = ()

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that departs beyond tolerance, in prefill or train, then in decode."""
        return next((layer for layer in (*self.layers, *self.steps) if layer.departs), None)

    @property
    def worst_gradient(self) -> ValueDifference | None:
        """The gradient that departs most; None if there are none."""
        return worst_of(self.gradients)

    @property
    def nearest_gradient(self) -> ValueDifference | None:
        """Of those that depart, the one nearest to the loss: what is wrong there spreads to all before."""
        return next((g for g in reversed(self.gradients) if g.departs), None)

    @property
    def ok(self) -> bool:
        """Whether nothing departs: no layer, no gradient, nor the loss."""
        values = (*self.gradients, *([self.loss] if self.loss else []))
        return self.first is None and not any(value.departs for value in values)

    @property
    def tables(self) -> list[Table]:
        """What is printed, table by table."""
        found = [self._verdict(), _table("Hidden states that each layer hands on", self.layers)]
        if self.steps:
            found.append(_table("The same of the decoded tokens", self.steps))
        if self.loss is not None:
            found.append(self._values(self.loss))
        return found

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
            "steps": [layer.to_dict() for layer in self.steps],
            "loss": None if self.loss is None else self.loss.to_dict(),
            "worst_gradient": None if self.worst_gradient is None else self.worst_gradient.name,
            "nearest_gradient": None
            if self.nearest_gradient is None
            else self.nearest_gradient.name,
            "gradients": [gradient.to_dict() for gradient in self.gradients],
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
        return Table(title=self._sentence(), notes=(*notes, *self.fallbacks))

    def _sentence(self) -> str:
        if self.first is not None:
            return f"{self.first.region} is the first to depart: it {self.first.reason}"
        if self.loss is not None and self.loss.departs:
            return f"every layer agrees, and the loss differs by {self.loss.largest:.1e}"
        gradient, nearest = self.worst_gradient, self.nearest_gradient
        if gradient is not None and nearest is not None:
            return (
                f"layers and loss agree, and the gradient of {gradient.name} departs most: by "
                f"{gradient.relative:.1e} of its largest value, {gradient.tolerance:.0e} is allowed; "
                f"nearest to the loss is that of {nearest.name}"
            )
        worst = max((*self.layers, *self.steps), key=lambda layer: layer.relative)
        return f"equal within tolerance; the largest difference is {worst.relative:.1e}, at {worst.region}"

    def _values(self, loss: ValueDifference) -> Table:
        listed = sorted(self.gradients, key=lambda value: value.relative, reverse=True)
        shown = [loss, *listed[:_GRADIENTS]]
        rows = tuple(
            (v.name, f"{v.largest:.1e}", f"{v.relative:.1e}", "departs" if v.departs else "")
            for v in shown
        )
        beyond = sum(value.departs for value in listed)
        note = f"{beyond} of {len(listed)} gradients depart; the first {len(shown) - 1} are shown"
        columns = ("<value", "largest", "of scale", "<")
        return Table(title="Loss and gradients", columns=columns, rows=rows, notes=(note,))


# Of a large model, most say the same.
_GRADIENTS = 8

COLUMNS = ("<layer", "tokens", "missing", "added", "largest", "mean", "of scale", "<")


def _table(title: str, layers: Sequence[LayerDifference]) -> Table:
    return Table(title=title, columns=COLUMNS, rows=tuple(difference_row(x) for x in layers))


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
    attention: str | None = None,
    cuda_graphs: bool = False,
    vision_lane: bool = False,
    disable: Collection[str] = (),
    new_tokens: int = 0,
    tolerance: float | None = None,
    **inputs: Any,
) -> Comparison:
    """Hold a compiled model against an eager run of the same inputs, layer by layer.

    A prompt goes through prefill, and `new_tokens` more through decode; with labels, the train program
    runs instead, and its loss and the gradient of every parameter are compared too. Dropout would make
    both sides random: call `model.eval()` first if the model has any.

    Args:
        model: a compiled model.
        reference: "transformers" (identity schedule only), "loop", "program", or "auto" for the
            first of these that fits. Decode and training take the loop for "transformers".
        backend, lowering, attention: instead of those that the model was compiled with.
        cuda_graphs, vision_lane: run the program so, too, as far as the model's device and schedule let it.
        disable: passes of `hidrop_fx.pipeline.OPTIONAL`, and of your own, to leave out.
        new_tokens: tokens to decode behind the prompt: the program's own likeliest, given to both sides.
        tolerance: largest difference taken for rounding, as a share of the layer's largest value;
            None for 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16.
        inputs: what `model(...)` takes. Caches are left out of account.

    Raises:
        HidropError: the model is not compiled, or a switch has no such setting.
    """
    bound = runtime_of(model)
    if bound is None:
        raise HidropError(
            f"this {type(model).__name__} is not compiled, so there is nothing to compare; call "
            "model = hidrop_fx.compile(model, schedule) first"
        )
    options = replace(
        bound.options,
        backend=bound.options.backend if backend is None else backend,
        lowering=bound.options.lowering if lowering is None else lowering,
        attention=bound.options.attention if attention is None else attention,
        cuda_graphs=cuda_graphs,
        vision_lane=vision_lane,
    )
    _check_options(options, bound, disable)
    labels = inputs.get("labels")
    checked_int(new_tokens, "new_tokens", minimum=0)
    if labels is not None and new_tokens:
        raise HidropError(
            f"new_tokens={new_tokens} came with labels; training decodes nothing: leave one of them out"
        )
    reference = _reference(reference, bound, disable, training=labels is not None)
    model = unwrapped(model)
    given = {k: v for k, v in inputs.items() if k not in ("labels", "past_key_values")}
    run = Instrumented(model, bound, options, disable)
    plain = None
    if reference == "program":
        eager = replace(options, backend="eager", cuda_graphs=False, vision_lane=False)
        plain = Instrumented(model, bound, eager, disable)
    try:
        if labels is None:
            parts = _prompt(model, bound, run, plain, reference, given, new_tokens, tolerance)
        else:
            parts = _training(model, bound, run, plain, given, labels, tolerance)
    finally:
        if run.graphs is not None:
            run.graphs.release()
    return Comparison(
        reference=reference,
        backend=options.backend,
        lowering=run._lowering("prefill"),
        disabled=tuple(disable),
        fallbacks=tuple(run.log.fallbacks),
        **parts,
    )


def _prompt(
    model: Any,
    bound: Runtime,
    run: Instrumented,
    plain: Instrumented | None,
    reference: str,
    given: Mapping[str, Any],
    new_tokens: int,
    tolerance: float | None,
) -> dict[str, Any]:
    batch = prepare(model, bound.schedule, given)
    states = run.states(given)
    share = _share(states, tolerance)
    if plain is not None:
        expected = plain.states(given).rows(batch.columns)
    elif reference == "transformers":
        expected = _states_of_transformers(model, given, batch)
    else:
        expected = run_loop(model, batch, Events.of(bound.schedule))
    parts: dict[str, Any] = {"layers": _differences(expected, states, batch.columns, share)}
    if new_tokens:
        parts["steps"] = _steps(model, bound, run, plain, batch, new_tokens, share)
    return parts


@torch.no_grad()
def _steps(
    model: Any,
    bound: Runtime,
    run: Instrumented,
    plain: Instrumented | None,
    batch: Batch,
    new_tokens: int,
    share: float,
) -> tuple[LayerDifference, ...]:
    """Differences of the tokens behind the prompt: every layer, the output, the logits."""
    found = run.steps(new_tokens)
    end = int(found.states.output_columns.max()) + 1
    if plain is not None:
        expected = plain.steps(new_tokens, found.tokens).states.rows(end)
    else:
        embeds = model.get_decoder().get_input_embeddings()(found.tokens)
        rows = run_loop(model, batch, Events.of(bound.schedule), new=embeds)
        pairs = zip(rows, found.states.output_columns, strict=True)
        expected = [states.at(columns) for states, columns in pairs]
    head = model.get_output_embeddings()
    scored = replace(found.states, hidden=[], columns=[], paths=[], output=found.logits)
    wanted = [replace(states, output=head(states.output)) for states in expected]
    layers = _differences(expected, found.states, end, share)
    (logits,) = _differences(wanted, scored, end, share)
    named = [*layers, replace(logits, region="logits")]
    return tuple(replace(layer, region=f"decode {layer.region}") for layer in named)


def _training(
    model: Any,
    bound: Runtime,
    run: Instrumented,
    plain: Instrumented | None,
    given: dict[str, Any],
    labels: Tensor,
    tolerance: float | None,
) -> dict[str, Any]:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HidropError(
            "labels were given, but no parameter of the model requires a gradient; leave labels out, or "
            "call model.requires_grad_(True)"
        )
    found = run.training(given, labels)
    assert found.states is not None
    share = _share(found.states, tolerance)
    batch = prepare(model, bound.schedule, {**given, "labels": labels}, grad=True)
    if plain is not None:
        step = plain.training(given, labels)
        assert step.states is not None
        rows = step.states.rows(batch.columns)
    else:
        names = inspect.signature(type(model).forward).parameters
        loss_inputs = {k: v for k, v in given.items() if k not in names}
        step, rows = train_loop(model, batch, Events.of(bound.schedule), labels, loss_inputs)
    with torch.no_grad():
        layers = _differences(rows, found.states, batch.columns, share)
    return {
        "layers": layers,
        "loss": value_difference("loss", step.loss, found.loss, share),
        "gradients": gradient_differences(step.gradients, found.gradients, share),
    }


def _share(states: ProgramStates, tolerance: float | None) -> float:
    return TOLERANCES.get(states.hidden[0].dtype, 1e-4) if tolerance is None else tolerance


def _check_options(options: Options, bound: Runtime, disable: Collection[str]) -> None:
    _check(options.backend, BACKENDS, "backend")
    if options.lowering is not None:
        _check(options.lowering, LOWERINGS, "lowering")
    _check(options.attention, ATTENTIONS, "attention")
    check_attention(options.attention, bound.model.device, bound.model.dtype)
    check_optional(disable, bound.options.passes)


def _reference(wanted: str, bound: Runtime, disable: Collection[str], *, training: bool) -> str:
    """What to hold the program against."""
    _check(wanted, REFERENCES, "reference")
    schedule = bound.schedule
    if schedule.prune and schedule.score == "random":
        raise HidropError(
            "score='random' draws other tokens in every run, so that no two can be compared; compile with "
            "another score to compare"
        )
    learned = training and schedule.selection == "dtopk"
    own = [p.__name__ for p in bound.options.passes if p.__name__ not in disable]
    if wanted == "auto":
        if own or learned:
            return "program"
        return "transformers" if schedule.identity and not training else "loop"
    if wanted == "transformers" and not schedule.identity:
        raise HidropError(
            f"reference='transformers' fits the identity schedule alone, and this one is {schedule}; "
            "use reference='loop'"
        )
    if wanted != "program" and learned:
        raise HidropError(
            f"reference={wanted!r} knows nothing of the ratios that selection='dtopk' learns; with labels "
            "use reference='program'"
        )
    return "loop" if wanted == "transformers" and training else wanted


def _differences(
    expected: Sequence[RowStates], states: ProgramStates, length: int, tolerance: float
) -> tuple[LayerDifference, ...]:
    def held(values: Tensor, columns: Tensor, layer: int | None, region: str) -> LayerDifference:
        return layer_difference(
            expected,
            values,
            columns,
            layer=layer,
            region=region,
            length=length,
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
