"""Layers of PEFT: those that a graph cannot hold, and those that are traced as in evaluation.

Most tuners are plain arithmetic of their parameters and are captured as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hidrop_fx.errors import UnsupportedModelError

# By the folder of peft.tuners.
_REFUSED = {
    "frod": "FRoD multiplies by a sparse matrix that it builds in each call",
    "lily": "Lily weighs its experts by the mean over all tokens of a batch, so that a schedule, and padding "
    "too, would change every token",
    "poly": "Poly needs a task of each row (task_ids), and a graph computes all rows alike",
    "xlora": "X-LoRA runs the model twice in each call, and weighs its adapters by the first",
    "shadow": "Shadow hands a second stream of hidden states from layer to layer",
    "shira": "SHiRA adds a sparse matrix that it builds in each call",
    "adaption_prompt": "an adaption prompt is a second attention within each layer",
}
# Of LoRA, by the variant of an adapter.
_REFUSED_VARIANTS = {
    "ALoraLinearVariant": "an activated LoRA (aLoRA) begins at another token of each row",
}
_REFUSED_IN_TRAINING = {
    "VeloraLinearVariant": "VeLoRA keeps compressed activations, from which its backward makes other gradients",
    "MontecloraLinearVariant": "MonteCLoRA samples its weights, and branches on what it drew",
}
_BRANCHING = ("loha", "lokr", "vblora")
_REMEDY = "Merge the adapter (model.merge_and_unload()) where PEFT can, take another tuner, such as LoRA, or leave the model uncompiled"


def check_adapters(decoder: nn.Module) -> None:
    """Raise for layers of PEFT that a graph cannot follow.

    Raises:
        UnsupportedModelError: names the tuner, the layer, and why.
    """
    for path, module in _adapted(decoder):
        tuner = type(module).__module__.split(".")[2]
        reasons = [_REFUSED[tuner]] if tuner in _REFUSED else []
        variants = getattr(module, "lora_variant", {})
        for name in _active(module):
            kind = type(variants[name]) if name in variants else None
            for base in () if kind is None else kind.__mro__:
                if base.__name__ in _REFUSED_VARIANTS:
                    reasons.append(_REFUSED_VARIANTS[base.__name__])
                if module.training and base.__name__ in _REFUSED_IN_TRAINING:
                    reasons.append(_REFUSED_IN_TRAINING[base.__name__])
        if module.training and _draws_modules(module):
            reasons.append(
                f"module_dropout and rank_dropout of {type(module).__module__} draw a number and branch on it"
            )
        if module.training and tuner == "vblora" and _has_infinite_logits(module):
            reasons.append("VB-LoRA does not train from a checkpoint of save_only_topk_weights")
        if reasons:
            raise UnsupportedModelError(
                f"{path} of the text decoder has an adapter of PEFT that is not captured: {reasons[0]}. {_REMEDY}"
            )


@contextmanager
def traced_as_in_evaluation(decoder: nn.Module) -> Iterator[None]:
    """Leave out branches on values in training that compute nothing.

    They are a number drawn for a module dropout of zero (LoHa, LoKr), and the test that no weight is infinite
    (VB-LoRA). Modules inside, such as dropouts, stay as they are.
    """
    changed = [
        module
        for _, module in _adapted(decoder)
        if module.training
        and type(module).__module__.split(".")[2] in _BRANCHING
        and not _draws_modules(module)
    ]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def _adapted(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in decoder.named_modules():
        if type(module).__module__.startswith("peft.tuners."):
            yield path, module


def _active(module: Any) -> list[str]:
    return list(getattr(module, "active_adapters", ()))


def _draws_modules(module: Any) -> bool:
    dropouts = (getattr(module, name, {}) for name in ("module_dropout", "rank_dropout"))
    kept = [values for values in dropouts if isinstance(values, dict)]
    return any(values.get(name) for values in kept for name in _active(module))


def _has_infinite_logits(module: Any) -> bool:
    logits = (
        module.vblora_logits_A[name] for name in _active(module) if name in module.vblora_logits_A
    )
    return any(bool(value[0, 0].isinf().any()) for value in logits)
