"""The default family: read off a class what HF's vision-language classes have in common.

    base.get_image_features, base.get_video_features     # encoders; their parameters are inputs of forward
    config.image_token_id, config.video_token_id         # whose features go to the places of these tokens
    base.compute_3d_position_ids                         # position ids on several axes
    -> ModelOutput in the annotation of forward          # what is returned

A class that does more than `hidrop_fx.models.forward_code` knows is refused by the name of that step.
"""

import inspect
import sys
import typing
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hidrop_fx.capture.layers import base_of, text_decoder
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models import forward_code
from hidrop_fx.models.family import Family, Modality
from hidrop_fx.models.items import ITEMS, VIDEO_ITEMS, units_of
from hidrop_fx.surroundings import neutral_surroundings

_AXES = 3


def inferred_family(model: Any) -> Family:
    """Return the family of a class that follows the common course, whatever its name.

    Raises:
        UnsupportedModelError: it does not follow it; the message says where, in the field's words.
    """
    name = type(model).__name__
    base = _base(model)
    kinds = [kind for kind in (modality_of(model, base, k) for k in ("image", "video")) if kind]
    if not kinds:
        raise UnsupportedModelError(
            f"{name} has no get_image_features whose result is put at placeholder tokens of the prompt "
            "(config.image_token_id): its images reach the text in another way, e.g. by cross-attention, "
            "and there are no vision tokens to schedule"
        )
    try:
        steps = forward_code.logit_steps(_class(model))
    except (ValueError, OSError, TypeError) as error:
        raise UnsupportedModelError(
            f"{name}.forward makes its logits in a way that a compiled model does not know: {error}"
        ) from error
    multiple = hasattr(base, "compute_3d_position_ids")
    return Family(
        modalities=tuple(kinds),
        base_output=_output(type(base), "last_hidden_state", BaseModelOutputWithPast),
        output=_output(type(model), "logits", CausalLMOutputWithPast),
        inputs=_position_inputs(base) if multiple else frozenset(),
        axes=_axes(model) if multiple else 1,
        position_ids=_position_ids if multiple else None,
        logits=steps,
    )


def check_steps(model: Any, family: Family) -> None:
    """Check that a family accounts for all that a class's forward does.

    Raises:
        UnsupportedModelError: there is a step that it does not declare.
    """
    base = base_of(model)
    try:
        steps = forward_code.steps_of(_class(base))
    except (ValueError, OSError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be compiled: {error}"
        ) from error
    decoder = text_decoder(model)
    if forward_code.MASKS not in steps and forward_code.sees_both_ways(
        _class(decoder), decoder.config
    ):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is an encoder (config.use_bidirectional_attention=True): its tokens see those "
            "behind them, and hidrop_fx schedules causal decoders; set it to False"
        )
    undeclared = [step for step in steps if step not in family.declares]
    if not undeclared:
        return
    words = {
        forward_code.EMBEDDINGS: "changes inputs_embeds beyond putting features at their places",
        forward_code.POSITION_IDS: "makes position ids of its own",
        forward_code.WORDS: "embeds other ids than those it was given",
        forward_code.MASKS: "makes attention masks of its own (blocks, prefixes)",
        forward_code.STATES: "changes the hidden states that its text decoder returns",
    }
    said = [words.get(step, f"hands {step} to its text decoder") for step in undeclared]
    raise UnsupportedModelError(
        f"{type(base).__name__}.forward {' and '.join(said)}, which a compiled model would leave out; "
        "a Family in hidrop_fx.models must declare it and say how it is done"
    )


def with_unread(model: Any, family: Family) -> Family:
    """Note which arguments of forward a family does not read though the class does."""
    known = forward_code.COMMON | family.inputs | {"mm_encoder_outputs", "labels"}
    known = known.union(*(kind.inputs for kind in family.modalities))
    read = forward_code.arguments_read(_class(base_of(model))) | forward_code.arguments_read(
        _class(model)
    )
    return replace(family, unread=read - known)


def description(family: Family, config: Any) -> str:
    """Say in one line what was inferred."""
    kinds = ", ".join(
        f"{kind.name}s at token {kind.token(config)} from {kind.pixels}"
        + (" (an integer keep counts entries)" if kind.count is None else "")
        for kind in family.modalities
    )
    axes = f"; position ids on {family.axes} axes" if family.axes > 1 else ""
    logits = "; its own steps behind the head" if family.logits is not None else ""
    return f"{kinds}{axes}{logits}"


def _class(instance: Any) -> Any:
    return type(instance)


def _base(model: Any) -> Any:
    """Return the model without its head, after checks of what a decoder must be."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its images are read by cross-attention, and its decoder has no "
            "vision tokens to schedule"
        )
    base = getattr(model, "model", None)
    if base is None or not hasattr(base, "forward") or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{name} has no base model under .model with a head .lm_head beside it, which are what a "
            "compiled forward takes the place of"
        )
    decoder = model.get_decoder()
    if decoder is None or decoder is base or hasattr(decoder, "lm_head"):
        raise UnsupportedModelError(
            f"{name} has no text model of its own: get_decoder() gives {type(decoder).__name__}, and query "
            "tokens or vocabulary tokens for images cannot be scheduled"
        )
    return base


def modality_of(model: Any, base: Any, kind: str) -> Modality | None:
    """Return how a class takes "image"s or "video"s; None if its base model has no encoder and no placeholder of them."""
    encode = getattr(base, f"get_{kind}_features", None)
    tokens = [f"{kind}_token_id", f"{kind}_token_index"]
    attribute = next((t for t in tokens if isinstance(getattr(model.config, t, None), int)), None)
    if encode is None or attribute is None:
        return None
    names = _encoder_arguments(base, f"get_{kind}_features")
    inputs = list(names.values())
    if not inputs or not inputs[0].startswith("pixel_values"):
        return None
    if _shares_image_token(base, model.config, kind):
        attribute = "image_token_id"
    counted = ITEMS if kind == "image" else VIDEO_ITEMS
    rule = counted.get(type(model).__name__)
    return Modality(
        name=kind,
        token=partial(_token, attribute=attribute),
        inputs=tuple(inputs),
        encode=partial(
            _encode,
            method=f"get_{kind}_features",
            names=names,
            first=_first_alone(base, f"get_{kind}_features"),
        ),
        count=rule,
        units=units_of(model, kind, inputs),
    )


def _token(config: Any, attribute: str) -> int:
    found: int = getattr(config, attribute)
    return found


def _encoder_arguments(base: Any, method: str) -> dict[str, str]:
    """Return the arguments of forward that an encoder takes, by the encoder's own names for them.

    Those that both have under one name, and those that forward hands over, under whatever name.
    """
    parameters = inspect.signature(getattr(base, method)).parameters.values()
    taken = set(inspect.signature(base.forward).parameters)
    try:
        handed = forward_code.encoder_arguments(_class(base), method)
    except (ValueError, OSError, TypeError):
        handed = {}
    shared = {p.name: p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name in taken}
    return shared | handed


def _first_alone(base: Any, method: str) -> frozenset[str]:
    try:
        return forward_code.first_alone(_class(base), method)
    except (ValueError, OSError, TypeError):
        return frozenset()  # which is what `check_steps` says more of


def _encode(
    base: Any, given: dict[str, Any], method: str, names: Mapping[str, str], first: frozenset[str]
) -> Any:
    given = given | {name: given[name][:1] for name in first & given.keys()}
    arguments = {name: given[source] for name, source in names.items() if source in given}
    return getattr(base, method)(**arguments, return_dict=True)


def _shares_image_token(base: Any, config: Any, kind: str) -> bool:
    """Return True for videos whose places bear the image's token, as the class's own mask tells."""
    find = getattr(base, "get_placeholder_mask", None)
    if kind != "video" or find is None:
        return False
    if "video_features" not in inspect.signature(find).parameters:
        return False
    with neutral_surroundings():
        ids = torch.tensor([[config.image_token_id, config.video_token_id]])
        found = find(ids, inputs_embeds=torch.zeros(1, 2, 1))
    return isinstance(found, tuple) and bool(found[1].reshape(-1)[0])


def _output(cls: type, field: str, default: type) -> type:
    """Return the `ModelOutput` that a class's forward is annotated with, if it has a field."""
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    given = inspect.signature(forward).return_annotation
    if isinstance(given, str):
        # A forward that was put into the class, as Liger's, has names of its own module.
        given = eval(given, {**vars(sys.modules[cls.__module__]), **forward.__globals__})
    for option in typing.get_args(given) or (given,):
        if isinstance(option, type) and issubclass(option, ModelOutput):
            return option if field in _fields(option) else default
    return default


def _fields(output: Any) -> set[str]:
    return {found.name for found in fields(output)}


def _axes(model: Any) -> int:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    section = rope.get("mrope_section") if isinstance(rope, dict) else None
    return len(section) if section else _AXES


def _position_inputs(base: Any) -> frozenset[str]:
    own = {"input_ids", "inputs_embeds", "attention_mask", "past_key_values"}
    return frozenset(inspect.signature(base.compute_3d_position_ids).parameters) - own


def _position_ids(base: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Return ids [axes, B, L] as the class computes them; it notes `rope_deltas` on the way."""
    names = inspect.signature(base.compute_3d_position_ids).parameters
    found: Tensor | None = base.compute_3d_position_ids(
        **{name: inputs.get(name) for name in names if name != "kwargs"}
    )
    return found
