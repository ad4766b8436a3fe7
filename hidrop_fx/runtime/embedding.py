"""Embeddings of a prompt's tokens: the text stream's alone where that is all the same, else of all columns.

    if looks_up_rows(embedding): text = embedding(ids[text_columns])      # [B, T, D]
    else: text = embedding(ids)[text_columns]                             # as Hugging Face calls it

NEFTune scales its noise by the length that it sees, soft prompts stand at columns, adapters count calls:
whatever is not a plain table gets the batch's own ids [B, L], in one call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from hidrop_fx.capture.zero3 import whole_shape
from hidrop_fx.errors import InputError

_FORWARD = nn.Embedding.forward

_HOOKS = (
    "_forward_pre_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)

_ASKS = {"make_inputs_require_grads", "make_inputs_require_grad"}


def looks_up_rows(embedding: nn.Module) -> bool:
    """Return True if an embedding is a plain table: which ids it is asked for together makes no difference.

    Not so with hooks, wrappers and subclasses (PEFT's among them), a norm that lookups enforce, and
    gradients that depend on how often an id came, or that hold only what was looked up.
    """
    own = embedding.__dict__
    hooks = own["_forward_hooks"]
    return (
        type(embedding) is nn.Embedding
        and type(embedding).forward is _FORWARD
        and "forward" not in own
        and not (own["max_norm"] is not None or own["scale_grad_by_freq"] or own["sparse"])
        and not any(own[name] for name in _HOOKS)
        and (not hooks or all(map(_asks_for_gradients, hooks.values())))
        and not nn_module._has_any_global_hook()
    )


def _asks_for_gradients(hook: Any) -> bool:
    """Return True for the hook by which transformers and PEFT let a checkpoint's input require gradients."""
    name, home = getattr(hook, "__name__", ""), getattr(hook, "__module__", None) or ""
    return name in _ASKS and home.partition(".")[0] in ("transformers", "peft")


def embedded(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Return the embeddings [B, L, D] of ids [B, L], as Hugging Face asks for them.

    Raises:
        InputError: they are not one for each id.
    """
    found: Any = embedding(ids)
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != ids.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"the token embedding (or a hook on it) returned {shape} for input_ids of "
            f"{list(ids.shape)}; it must give one embedding for each. To add tokens, pass inputs_embeds "
            "with an attention_mask of their length"
        )
    return found


def within_table(embedding: nn.Module, ids: Tensor, places: Sequence[int]) -> Tensor:
    """Return ids with 0 for those that stand for no row of a table, as ids of vision places may.

    The rows are those of the whole table, of which ZeRO-3 leaves an empty tensor between the calls of the embedding.
    """
    weight = embedding._parameters.get("weight")  # as an attribute ZeRO-3 would gather it
    if weight is None:
        weight = getattr(embedding, "weight", None)
    if weight is None:
        return ids
    rows = whole_shape(weight)[0]
    return ids if max(places) < rows else ids.where(ids < rows, 0)


def placeholder_columns(
    embedding: nn.Module, token: int, embeds: Tensor, *, images: bool
) -> Tensor:
    """Return which embeddings [B, L, D] are a placeholder's, bool [B, L].

    The table's own vector is looked for first, without hooks: one that draws noise would never give it twice.
    Only where it is nowhere, and there are images, is the embedding called as Hugging Face calls it.
    """
    with torch.no_grad():
        ids = torch.full((1, 1), token, device=embeds.device)
        found = (embeds == embedding.forward(ids)[0, 0]).all(dim=-1)
        if images and not looks_up_rows(embedding) and not bool(found.any()):
            found = (embeds == embedding(ids[0, 0])).all(dim=-1)
    return found
