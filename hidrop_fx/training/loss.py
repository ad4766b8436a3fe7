"""Labels for the rows that reach the head: shifted first, then gathered.

    target[i] = labels[i + 1]                    # what column i predicts
    rows      = [0, *target[text_columns]]       # a loss that shifts finds each target in its place

A target so stays with the column that predicts it, also where the next column is a vision token that
is not among the rows. The first token of a row has none: where pads stand before it, transformers
lets a pad predict it, which no row here does.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from hidrop_fx.planning.batch_layout import IGNORE


def supervision(labels: Tensor | None, loss_inputs: dict[str, Any]) -> Tensor | None:
    """Return labels [B, L] that say which columns are supervised, whatever form the caller gave them in.

    `shift_labels` (context parallelism) are labels whose column predicts them already. An
    `ignore_index` of the caller's own becomes ours.
    """
    if labels is None:
        return None
    shifted = loss_inputs.get("shift_labels")
    if shifted is not None:
        labels = pad(shifted, (1, 0), value=_ignored(loss_inputs))[:, :-1]
    ignored = _ignored(loss_inputs)
    return labels if ignored == IGNORE else labels.masked_fill(labels == ignored, IGNORE)


def gathered_labels(
    labels: Tensor, columns: Tensor, loss_inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the arguments of `model.loss_function` for logits at `columns` [B, T], a sentinel >= L ignored.

    Args:
        labels: int64 [B, L], not shifted.

    Returns:
        "labels" [B, T], to be shifted once more by the loss, and "shift_labels" [B, T] if the caller
        gave them.
    """
    ignored = _ignored(loss_inputs)
    shifted = loss_inputs.get("shift_labels")
    targets = pad(labels[:, 1:], (0, 1), value=ignored) if shifted is None else shifted
    targets = pad(targets.to(columns.device), (0, 1), value=ignored).gather(
        1, columns.clamp(max=labels.shape[1])
    )
    found = {"labels": pad(targets, (1, 0), value=ignored)[:, :-1]}
    return found if shifted is None else found | {"shift_labels": targets}


def labels_behind_tokens(
    labels: Tensor, attention_mask: Tensor | None, loss_inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the arguments of `model.loss_function` for logits of every column, none predicted by padding.

    Args:
        labels: int64 [B, L], not shifted.
        attention_mask: [B, L], or what was before too, zero at padding; None where there is none.

    Returns:
        "labels" [B, L], and "shift_labels" [B, L] if the caller gave them.
    """
    shifted = loss_inputs.get("shift_labels")
    if attention_mask is not None:
        padding = attention_mask[:, -labels.shape[1] :].to(labels.device) == 0
        if shifted is not None:
            shifted = shifted.masked_fill(padding, _ignored(loss_inputs))
        labels = labels.masked_fill(pad(padding[:, :-1], (1, 0)), _ignored(loss_inputs))
    found = {"labels": labels}
    return found if shifted is None else found | {"shift_labels": shifted}


def predicting_rows(targets: dict[str, Tensor], loss_inputs: dict[str, Any]) -> Tensor:
    """Return which rows of the logits predict a supervised token, bool [B, T].

    Args:
        targets: arguments of `model.loss_function` for these rows, from the functions above.
    """
    ignored = _ignored(loss_inputs)
    found = targets.get("shift_labels")
    if found is None:
        found = pad(targets["labels"][:, 1:], (0, 1), value=ignored)
    return found != ignored


def share_of_step(supervised: Tensor, loss_inputs: dict[str, Any]) -> Tensor | float:
    """Return the part of an optimizer step that this call is, where `num_items_in_batch` tells; else 1.

    Terms of the loss that are no sum over tokens take it as a factor, to count once over the
    micro-batches of a step.

    Args:
        supervised: as from `supervision`.
    """
    items = loss_inputs.get("num_items_in_batch")
    return 1.0 if items is None else (supervised[:, 1:] != IGNORE).sum() / items


def _ignored(loss_inputs: dict[str, Any]) -> int:
    return int(loss_inputs.get("ignore_index", IGNORE))
