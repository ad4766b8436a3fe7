"""A model's forward, and its base's: logits and loss of the compiled programs.

model.forward(input_ids, pixel_values, labels)        # forward
model.model.forward(input_ids, pixel_values)          # base_forward, without the head
"""

from functools import partial
from typing import Any

from torch import Tensor

from hidrop_fx.models import family_of
from hidrop_fx.runtime.hf.dual_step import dual_prediction, dual_states, step_in_force
from hidrop_fx.runtime.hf.moving import moving
from hidrop_fx.runtime.hf.override import arguments
from hidrop_fx.runtime.hf.prediction import loss_of, predict, read
from hidrop_fx.runtime.hf.replaced import labels_of_caller
from hidrop_fx.runtime.runtime import Runtime


def forward(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Return logits, and HF's own loss where labels are given.

    `logits_to_keep=1` gives the last *valid* row of each sample, also where padding is on the right.
    In training with labels the head and the loss see the text stream alone: `logits` are [B, T, V],
    the rows at `logit_columns` [B, T] of the output; None with `fused_loss=True`, as with Liger's.
    """
    return moving(model, partial(_forward, model, runtime), args, kwargs)


def _forward(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    request = read(model, args, kwargs)
    step = step_in_force(model, runtime, request.labels)
    if step is None:
        found = predict(model, runtime, request, fused=True)
        loss = loss_of(model, runtime, request, found)
    else:
        found, loss = dual_prediction(model, step, request)
    states = found.states
    family = family_of(model)
    output = family.output(
        loss=loss,
        logits=found.logits,
        past_key_values=states.cache,
        hidden_states=states.hidden_states,
        **vision_states(family.output, states.features),
    )
    if states.columns is not None:
        output.logit_columns = states.columns
    if states.extras:
        output.pass_outputs = states.extras
    return output if _wants_dict(model.config, request.inputs) else output.to_tuple()


def base_forward(base: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Return hidden states of the full length."""
    return moving(base, partial(_base_forward, base, runtime), args, kwargs)


def _base_forward(base: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    model = runtime.model
    inputs = arguments(type(base).forward, base, args, kwargs)
    labels = labels_of_caller(model, runtime)
    step = step_in_force(model, runtime, labels)
    if step is None:
        states = runtime.call(inputs, labels=labels)
    else:
        states = dual_states(model, step, inputs, labels)
    output_type = family_of(model).base_output
    output = output_type(
        last_hidden_state=states.hidden,
        past_key_values=states.cache,
        hidden_states=states.hidden_states,
        **vision_states(output_type, states.features),
    )
    return output if _wants_dict(model.config, inputs) else output.to_tuple()


def vision_states(output: type, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the fields of an output class that hold features [tokens, D], e.g. `image_hidden_states`."""
    named = {f"{name}_hidden_states": states for name, states in features.items()}
    fields = output.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: states for name, states in named.items() if name in fields}


def _wants_dict(config: Any, inputs: dict[str, Any]) -> bool:
    wanted = inputs.get("return_dict")
    if wanted is None:
        wanted = getattr(config, "return_dict", True)
    return bool(wanted)
