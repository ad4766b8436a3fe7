"""A call of a model's forward, in parts: its arguments, the logits of its rows, their loss.

request = read(model, args, kwargs)
found = predict(model, runtime, request)      # states, logits, targets
loss = loss_of(model, runtime, request, found)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.runtime.hf.fused_loss import fused_loss
from hidrop_fx.runtime.hf.head import logits_of
from hidrop_fx.runtime.hf.moving import with_tensors_of_base
from hidrop_fx.runtime.hf.override import arguments, signature_of
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import DecoderOutput, Rows
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.loss import (
    gathered_labels,
    labels_behind_tokens,
    share_of_step,
    supervision,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The arguments of a call."""

    inputs: dict[str, Any]
    """All by name, labels and `logits_to_keep` aside."""
    labels: Tensor | None
    """int64 [B, L], as they were given."""
    supervised: Tensor | None
    """int64 [B, L], from `supervision`."""
    keep: int | Tensor
    """`logits_to_keep`"""
    rows: Rows
    loss_inputs: dict[str, Any]
    """Arguments that are the loss function's, such as `num_items_in_batch`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a call computes under one schedule."""

    states: DecoderOutput
    logits: Tensor | None
    """[B, T, V], of the rows that the call asked for; None where head and loss ran part by part."""
    targets: dict[str, Tensor]
    """Labels of these rows, as arguments of `model.loss_function`; empty where there are none."""
    loss: Tensor | None = None
    """Of head and loss that ran part by part."""


def read(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    """Read the arguments of a call of the model's forward."""
    own = type(model).forward
    inputs = dict(arguments(own, model, args, kwargs))
    labels = inputs.pop("labels", None)
    keep = inputs.pop("logits_to_keep", 0)
    names = signature_of(own).parameters
    loss_inputs = {k: v for k, v in inputs.items() if k not in names}
    rows: Rows = "all"
    if labels is None and isinstance(keep, int) and keep == 1:
        rows = "last"
    elif labels is not None and model.training and isinstance(keep, int) and keep == 0:
        rows = "text"
    return Request(
        inputs=inputs,
        labels=labels,
        supervised=supervision(labels, loss_inputs),
        keep=keep,
        rows=rows,
        loss_inputs=loss_inputs,
    )


def predict(model: Any, runtime: Runtime, request: Request, *, fused: bool = False) -> Prediction:
    """Run decoder and head.

    Args:
        fused: nobody wants the logits of a call whose loss is computed without them.
    """
    inputs, labels, keep = request.inputs, request.labels, request.keep
    draft = _draft(inputs.get("past_key_values"), keep)
    states = with_tensors_of_base(
        model,
        lambda: runtime.call(inputs, labels=request.supervised, rows=request.rows, draft=draft),
    )
    targets: dict[str, Tensor] = {}
    if labels is not None and states.columns is not None:
        targets = gathered_labels(labels, states.columns, request.loss_inputs)
    elif labels is not None:
        targets = labels_behind_tokens(labels, inputs.get("attention_mask"), request.loss_inputs)
    loss = logits = None
    if fused and request.rows == "text" and states.columns is not None:
        loss = fused_loss(model, runtime, states.hidden, targets, request.loss_inputs)
    if loss is None:
        logits = logits_of(model, rows_to_keep(states.hidden, keep))
    return Prediction(states=states, logits=logits, targets=targets, loss=loss)


def loss_of(model: Any, runtime: Runtime, request: Request, found: Prediction) -> Tensor | None:
    """Return the model's own loss, with the budget term of learned ratios in training; None without labels."""
    if not found.targets:
        return None
    loss = found.loss
    if loss is None:
        vocabulary = model.config.get_text_config().vocab_size
        loss = model.loss_function(
            logits=found.logits, vocab_size=vocabulary, **{**request.loss_inputs, **found.targets}
        )
    assert loss is not None
    if request.supervised is not None and model.training and runtime.ratios is not None:
        share = share_of_step(request.supervised, request.loss_inputs)
        if isinstance(share, Tensor):
            share = share.to(loss.device)
        loss = loss + share * runtime.ratios.penalty().to(loss.device)
    return loss


def rows_to_keep(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Return the rows of `hidden` [B, L, D] that `logits_to_keep` asks for, as transformers slices them."""
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if not isinstance(keep, Tensor) or keep.dim() < 2:
        return hidden[:, keep.to(hidden.device) if isinstance(keep, Tensor) else keep]
    keep = keep.to(hidden.device)
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden.gather(1, keep[:, :, None].expand(-1, -1, hidden.shape[2]))


def _draft(cache: Any, keep: int | Tensor) -> int:
    """Return the tokens behind the prompt in the first call of assisted decoding."""
    starts = isinstance(cache, HidropCache) and cache.speculative and cache.get_seq_length() == 0
    return keep - 1 if starts and isinstance(keep, int) and keep > 1 else 0
