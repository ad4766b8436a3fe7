"""transformers' causal loss of the supervised rows, a part at a time, where a model is compiled with `fused_loss=True`.

    loss = fused_loss(model, runtime, states.hidden, targets, loss_inputs)   # None: logits as ever

It is the model's own loss function that each part goes through, behind its own head and its class's steps.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from hidrop_fx.capture.sharded import is_sharded, is_whole
from hidrop_fx.planning.batch_layout import IGNORE
from hidrop_fx.runtime.hf.head import logits_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.fused_loss import summed_loss


def fused_loss(
    model: Any,
    runtime: Runtime,
    hidden: Tensor,
    targets: dict[str, Tensor],
    loss_inputs: dict[str, Any],
) -> Tensor | None:
    """Return the loss fp32 [] of rows [B, T, D] in training; None where their logits have to be made.

    Args:
        targets: labels [B, T] as `gathered_labels` returns them.
        loss_inputs: further arguments of `model.loss_function`.
    """
    if not runtime.options.fused_loss:
        return None
    reason = _kept_apart(model, hidden)
    if reason is not None:
        runtime.log_once(f"fused_loss=True has no effect here: {reason}; the logits are made")
        return None
    ignored = int(loss_inputs.get("ignore_index", IGNORE))
    shifted = targets.get("shift_labels")
    if shifted is None:
        shifted = pad(targets["labels"][:, 1:], (0, 1), value=ignored)
    flat = shifted.flatten()
    supervised = (flat != ignored).nonzero().flatten()
    vocabulary = model.config.get_text_config().vocab_size
    causal = partial(model.loss_function, labels=None, vocab_size=vocabulary, ignore_index=ignored)
    if not len(supervised):  # what no token gives, with its gradients
        items = loss_inputs.get("num_items_in_batch")
        one = logits_of(model, hidden[:1, :1])
        nothing: Tensor = causal(one, shift_labels=shifted[:1, :1], num_items_in_batch=items)
        return nothing
    rows = hidden.flatten(0, 1).index_select(0, supervised.to(hidden.device))

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        found: Tensor = causal(logits_of(model, some), shift_labels=wanted, num_items_in_batch=1)
        return found

    head = model.get_output_embeddings()
    total = summed_loss(rows, flat[supervised], part, list(head.parameters()))
    items = loss_inputs.get("num_items_in_batch")
    if items is None:
        items = len(supervised)
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _kept_apart(model: Any, hidden: Tensor) -> str | None:
    """Return why head and loss of a model do not go part by part; None if they do."""
    function = model.loss_function
    if function is not ForCausalLMLoss:
        return f"model.loss_function is {getattr(function, '__qualname__', function)}, not ForCausalLMLoss"
    head = model.get_output_embeddings()
    # DeepSpeed's ZeRO-3 marks what it takes apart.
    whole = all(is_whole(v) and not hasattr(v, "ds_id") for v in head.parameters())
    if is_sharded(model) or not whole:
        return "the model is sharded, and its head is gathered once a step"
    if any(value.is_meta for value in head.parameters()):
        return "the head is offloaded"
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    if dtype == torch.float16:
        return "gradients are made before a scaler multiplies them, and those of float16 vanish"
    return None
