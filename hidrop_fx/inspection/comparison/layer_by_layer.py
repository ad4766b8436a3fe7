"""Compare a compiled model with a reference: is it right, and if not, from which layer on?

    found = hidrop_fx.compare(model, **inputs)
    print(found)                # a line a layer, the first that departs named
    found.first                 # None if nothing does

The reference is transformers' own forward where the schedule is the identity, else a plain loop over
the model's own layers (`hidrop_fx.reference.loop`), in which no part of this package's graph takes
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
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch, prepare_batch
from hidrop_fx.inspection.comparison.differences import (
    TOLERANCES,
    LayerDifference,
    gradient_differences,
    state_differences,
    value_difference,
)
from hidrop_fx.inspection.comparison.references import checked_reference, states_of_transformers
from hidrop_fx.inspection.comparison.result import Comparison
from hidrop_fx.inspection.instrumented import Instrumented, ProgramStates
from hidrop_fx.models import family_of
from hidrop_fx.ops.packed_attention import check_attention
from hidrop_fx.pipeline.pipeline import check_optional
from hidrop_fx.reference.loop import Events, run_loop
from hidrop_fx.reference.training import train_loop
from hidrop_fx.runtime.hf.binding import require_runtime, unwrapped
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.keeps import checked_int


def compare(
    model: Any,
    *,
    reference: str = "auto",
    backend: str | None = None,
    lowering: str | None = None,
    attention: str | None = None,
    cuda_graphs: bool = False,
    overlap_vision: bool = False,
    disable: Collection[str] = (),
    new_tokens: int = 0,
    tolerance: float | None = None,
    **inputs: Any,
) -> Comparison:
    """Compare a compiled model with an eager run of the same inputs, layer by layer.

    A prompt goes through prefill, and `new_tokens` more through decode; with labels, the train program
    runs instead, and its loss and the gradient of every parameter are compared too. Dropout would make
    both sides random: call `model.eval()` first if the model has any.

    Args:
        model: a compiled model.
        reference: "transformers" (identity schedule only), "loop", "program", or "auto" for the
            first of these that fits. Decode and training take the loop for "transformers".
        backend, lowering, attention: instead of those that the model was compiled with.
        cuda_graphs, overlap_vision: run the program so, too, as far as the model's device and schedule let it.
        disable: names of passes to leave out: of `hidrop_fx.pipeline.pipeline.optional_passes()`, and custom ones.
        new_tokens: tokens to decode behind the prompt: the program's own likeliest, given to both sides.
        tolerance: largest difference taken for rounding, as a share of the layer's largest value;
            None for 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16.
        inputs: what `model(...)` takes. Caches are left out of account.

    Raises:
        HidropError: the model is not compiled, or a switch has no such setting.
    """
    bound = require_runtime(
        model, "there is nothing to compare: call model = hidrop_fx.compile(model, schedule) first"
    )
    options = replace(
        bound.options,
        backend=bound.options.backend if backend is None else backend,
        lowering=bound.options.lowering if lowering is None else lowering,
        attention=bound.options.attention if attention is None else attention,
        cuda_graphs=cuda_graphs,
        overlap_vision=overlap_vision,
    )
    check_attention(options.attention, home(text_decoder(bound.model)), bound.model.dtype)
    check_optional(disable, bound.options.passes)
    labels = inputs.get("labels")
    checked_int(new_tokens, "new_tokens", minimum=0)
    if labels is not None and new_tokens:
        raise HidropError(
            f"new_tokens={new_tokens} came with labels; training decodes nothing: leave one of them out"
        )
    reference = checked_reference(reference, bound, disable, training=labels is not None)
    model = unwrapped(model)
    given = {k: v for k, v in inputs.items() if k not in ("labels", "past_key_values")}
    run = Instrumented(model, bound, options, disable)
    plain = None
    if reference == "program":
        eager = replace(options, backend="eager", cuda_graphs=False, overlap_vision=False)
        plain = Instrumented(model, bound, eager, disable)
    try:
        if labels is None:
            parts = _prompt(model, bound, run, plain, reference, given, new_tokens, tolerance)
        else:
            parts = _training(model, bound, run, plain, given, labels, tolerance)
    finally:
        run.release()
    return Comparison(
        reference=reference,
        backend=options.backend,
        lowering=run.runtime.programs.lowering("prefill"),
        disabled=tuple(disable),
        fallbacks=tuple(run.runtime.programs.log.fallbacks),
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
    batch = prepare_batch(model, bound.schedule, given)
    states = run.states(given)
    share = _share(states, tolerance)
    if plain is not None:
        expected = plain.states(given).rows(batch.columns)
    elif reference == "transformers":
        expected = states_of_transformers(model, given, batch)
    else:
        expected = run_loop(model, batch, Events.of(batch.layout.plan))
    parts: dict[str, Any] = {
        "layers": state_differences(expected, states, length=batch.columns, tolerance=share)
    }
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
    """Compare the tokens behind the prompt: every layer, the output, the logits."""
    found = run.steps(new_tokens)
    end = int(found.states.output_columns.max()) + 1
    if plain is not None:
        expected = plain.steps(new_tokens, found.tokens).states.rows(end)
    else:
        words = family_of(model).embedded_ids(model.config, found.tokens)
        embeds = text_decoder(model).get_input_embeddings()(words)
        rows = run_loop(model, batch, Events.of(batch.layout.plan), new=embeds)
        pairs = zip(rows, found.states.output_columns, strict=True)
        expected = [states.at(columns) for states, columns in pairs]
    head = model.get_output_embeddings()
    scored = replace(found.states, hidden=[], columns=[], paths=[], output=found.logits)
    wanted = [replace(states, output=head(states.output)) for states in expected]
    layers = state_differences(expected, found.states, length=end, tolerance=share)
    (logits,) = state_differences(wanted, scored, length=end, tolerance=share)
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
    found, states = run.training(given, labels)
    share = _share(states, tolerance)
    batch = prepare_batch(model, bound.schedule, {**given, "labels": labels}, grad=True)
    if plain is not None:
        step, expected = plain.training(given, labels)
        rows = expected.rows(batch.columns)
    else:
        names = inspect.signature(type(model).forward).parameters
        loss_inputs = {k: v for k, v in given.items() if k not in names}
        step, rows = train_loop(model, batch, Events.of(batch.layout.plan), labels, loss_inputs)
    with torch.no_grad():
        layers = state_differences(rows, states, length=batch.columns, tolerance=share)
    return {
        "layers": layers,
        "loss": value_difference("loss", step.loss, found.loss, share),
        "gradients": gradient_differences(step.gradients, found.gradients, share),
    }


def _share(states: ProgramStates, tolerance: float | None) -> float:
    return TOLERANCES.get(states.hidden[0].dtype, 1e-4) if tolerance is None else tolerance
