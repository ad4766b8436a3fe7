"""The functions by which a layer's own module runs the gated delta rule, as one operator with a backward.

    out, state = DELTA_RULE(query, key, value, decay, write, state, home, normalised)

`home` is the name of the module: with flash-linear-attention its functions are those kernels. Their loops over chunks of
tokens would be unrolled for one length, so that they are opaque to a compiler; the backward runs them once more.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHUNKED_RULE = "torch_chunk_gated_delta_rule"
"""Name, in the module of a layer's class, of the function that runs many tokens."""
STEPPED_RULE = "torch_recurrent_gated_delta_rule"
"""Name of the one that runs one token behind others."""

_KEYS = torch._C.DispatchKey
_AUTOGRAD = (
    _KEYS.AutogradFunctionality,
    _KEYS.AutogradOther,
    _KEYS.AutogradNestedTensor,
    _KEYS.ADInplaceOrView,
)


@torch.library.custom_op("hidrop::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Run the rule on [B, S, G, d], [B, S, G, d], [B, S, H, e]; return [B, S, H, e] and the state behind it."""
    return _applied(query, key, value, decay, write, state, home, normalised)


@gated_delta_rule.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads = value.shape[0], value.shape[2]
    after = query.new_empty((batch, heads, key.shape[3], value.shape[3]), dtype=torch.float32)
    return query.new_empty(value.shape), after


@torch.library.custom_op("hidrop::gated_delta_rule_backward", mutates_args=())
def gated_delta_rule_backward(
    grad: Tensor,
    grad_after: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> list[Tensor]:
    """Return the gradients of what the rule was given, the state's last where there was one: it runs once more."""
    given = (query, key, value, decay, write, *(() if state is None else (state,)))
    with recording():
        leaves = [each.detach().requires_grad_() for each in given]
        q, k, v, g, beta, *before = leaves
        found = _applied(q, k, v, g, beta, before[0] if before else None, home, normalised)
        grads = torch.autograd.grad(found, leaves, (grad, grad_after), allow_unused=True)
    return [
        torch.zeros_like(leaf) if got is None else got.contiguous()
        for leaf, got in zip(leaves, grads, strict=True)
    ]


@contextmanager
def recording() -> Iterator[None]:
    """Record what a backward needs inside an operator, beneath which autograd is left out."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        left_out = left_out.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


@gated_delta_rule_backward.register_fake
def _(
    grad: Tensor,
    grad_after: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> list[Tensor]:
    given = (query, key, value, decay, write, *(() if state is None else (state,)))
    return [each.new_empty(each.shape) for each in given]


def _note_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.home, ctx.normalised = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    backward = torch.ops.hidrop.gated_delta_rule_backward.default
    found = backward(grad, grad_after, *tensors, ctx.home, ctx.normalised)
    of_state = found[5] if tensors[5] is not None else None
    return (*found[:5], of_state, None, None)


gated_delta_rule.register_autograd(_differentiate, setup_context=_note_inputs)

DELTA_RULE = torch.ops.hidrop.gated_delta_rule.default


def _applied(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    write: Tensor,
    state: Tensor | None,
    home: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    one = state is not None and query.shape[1] == 1
    rule: Callable[..., Any] = getattr(sys.modules[home], STEPPED_RULE if one else CHUNKED_RULE)
    out, after = rule(
        query,
        key,
        value,
        g=decay,
        beta=write,
        initial_state=None if state is None else state.contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalised,
    )
    # What an operator returns must be neither a view nor one of its inputs.
    return out.contiguous(), after.float().contiguous()
