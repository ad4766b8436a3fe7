"""The head of a model, and what its class does behind it."""

from typing import Any

from torch import Tensor

from hidrop_fx.models import family_of


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [..., V] of hidden states [..., D]: the head's rows, scaled or capped as the class does."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    family = family_of(model)
    return logits if family.logits is None else family.logits(model, logits)
