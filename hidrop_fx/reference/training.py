"""Compute loss and gradients of a schedule by the plain loop: what the train program is held against.

rows   = run_loop(model, batch, events, grad=True)
logits = head(rows at their columns, zeros elsewhere)
loss   = model.loss_function(logits, labels)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.models import family_of
from hidrop_fx.planning.batch_layout import IGNORE
from hidrop_fx.reference.loop import Events, run_loop
from hidrop_fx.reference.rows import PreparedBatch, RowStates


@dataclass(kw_only=True)
class TrainingStep:
    """A forward with labels, and its backward."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    """By parameter; None where nothing came back."""


def train_loop(
    model: Any, batch: PreparedBatch, events: Events, labels: Tensor, loss_inputs: Mapping[str, Any]
) -> tuple[TrainingStep, list[RowStates]]:
    """Run one training step of the plain loop.

    Args:
        batch: prepared with `grad`, or no gradient reaches embeddings.
    """
    rows = run_loop(model, batch, events, grad=True)
    full = batch.as_given(torch.stack([_placed(states, batch.columns) for states in rows]))
    with torch.enable_grad():
        loss = loss_of(model, full, batch, labels, loss_inputs)
        found = gradients(model, loss, shared=True)
        return TrainingStep(loss=loss.detach(), gradients=found), [s.detached() for s in rows]


def loss_of(
    model: Any, full: Tensor, batch: PreparedBatch, labels: Tensor, loss_inputs: Mapping[str, Any]
) -> Tensor:
    """Compute the model's own loss of normalised hidden states [B, L, D]."""
    if model.training:
        # Nothing predicts a row's first token: the text stream alone has logits, and no pad.
        labels = labels.clone()
        for row in range(batch.rows):
            columns = torch.cat([batch.row_columns(name, row) for name in ("text", "vision")])
            labels[row, batch.given_columns(columns, row).min()] = IGNORE
    logits = model.get_output_embeddings()(full)
    steps = family_of(model).logits
    if steps is not None:
        logits = steps(model, logits)
    vocabulary = model.config.get_text_config().vocab_size
    found: Tensor = model.loss_function(
        logits=logits, labels=labels, vocab_size=vocabulary, **loss_inputs
    )
    return found


def gradients(model: nn.Module, loss: Tensor, *, shared: bool = False) -> dict[str, Tensor | None]:
    """Compute the gradient of every parameter that requires one.

    Args:
        model: its parameters' `grad` stays as it is.
        loss: a scalar.
        shared: other losses come from the same embeddings, so that their graph is kept.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=shared)
    return dict(zip(named, found, strict=True))


def _placed(states: RowStates, length: int) -> Tensor:
    """The output of one row at its columns, [L, D]."""
    assert states.output is not None
    full = states.output.new_zeros(length, states.output.shape[1])
    return full.index_copy(0, states.columns[-1], states.output)
