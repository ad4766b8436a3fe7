"""The functions by which a layer's own module runs a selective state space, as one operator with a backward.

    out, state = SELECTIVE_SCAN(query, key, value, step, rates, state, home, chunk)

`home` is the name of the module: with mamba-ssm its functions are those kernels. Their loops over chunks of tokens would be
unrolled for one length, so that they are opaque to a compiler; the backward runs them once more.

Mamba-2 has one rate a head, rates [H]; Mamba one for each channel and place of the state, rates [C, N], and one head.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hidrop_fx.ops.delta_rule import recording


class ScanNames(NamedTuple):
    """Names, in the module of a layer's class, of its functions."""

    many: str
    """Of that which runs many tokens."""
    one: str
    """Of that which runs one token behind others."""


MAMBA = ScanNames("mamba_selective_scan", "mamba_selective_state_update")
MAMBA_2 = ScanNames("mamba2_chunk_scan", "mamba2_selective_state_update")


@torch.library.custom_op("hidrop::selective_scan", mutates_args=())
def selective_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Run a state space; return what is read, fp32 [B, S, H, P], and the state behind it, fp32 [B, H, P, N].

    Args:
        query, key: what is read of a state, and where is written, [B, S, G, N].
        value: [B, S, H, P].
        step: lengths of the steps, at least 0, [B, S, H], or [B, S, P] where `rates` are [P, N].
        rates: at most 0.
        state: [B, H, P, N].
        chunk: tokens of a chunk, for Mamba-2.
    """
    return _applied(query, key, value, step, rates, state, home, chunk)


@selective_scan.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = value.shape
    after = value.new_empty((batch, heads, width, key.shape[3]), dtype=torch.float32)
    return value.new_empty(value.shape, dtype=torch.float32), after


@torch.library.custom_op("hidrop::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad: Tensor,
    grad_after: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> list[Tensor]:
    """Return the gradients of what the scan was given, the state's last where there was one: it runs once more."""
    given = (query, key, value, step, rates, *(() if state is None else (state,)))
    with recording():
        leaves = [each.detach().requires_grad_() for each in given]
        q, k, v, dt, a, *before = leaves
        if before and (a.dim() == 2 or v.shape[1] == 1):
            # Functions of single tokens write to the state, which their own backward would need.
            found = _stepped(q, k, v, dt, a, before[0])
        else:
            found = _applied(q, k, v, dt, a, before[0] if before else None, home, chunk)
        grads = torch.autograd.grad(found, leaves, (grad, grad_after), allow_unused=True)
    return [
        torch.zeros_like(leaf) if got is None else got.contiguous()
        for leaf, got in zip(leaves, grads, strict=True)
    ]


@selective_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_after: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> list[Tensor]:
    given = (query, key, value, step, rates, *(() if state is None else (state,)))
    return [each.new_empty(each.shape) for each in given]


def _note_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.home, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    backward = torch.ops.hidrop.selective_scan_backward.default
    found = backward(grad, grad_after, *tensors, ctx.home, ctx.chunk)
    of_state = found[5] if tensors[5] is not None else None
    return (*found[:5], of_state, None, None)


selective_scan.register_autograd(_differentiate, setup_context=_note_inputs)

SELECTIVE_SCAN = torch.ops.hidrop.selective_scan.default


def _applied(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    run = _mamba_2 if rates.dim() == 1 else _mamba
    out, after = run(query, key, value, step, rates, state, home, chunk)
    # What an operator returns must be neither a view nor one of its inputs.
    return out.float().contiguous(), after.float().contiguous()


def _mamba_2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    width, places = value.shape[3], key.shape[3]
    if state is not None and value.shape[1] == 1:
        after = state.clone(memory_format=torch.contiguous_format)
        out = _named(home, MAMBA_2.one)(
            after,
            value[:, 0],
            step[:, 0, :, None].expand(-1, -1, width),
            rates[:, None, None].expand(-1, width, places),
            key[:, 0],
            query[:, 0],
            # The kernel asks for its strides.
            dt_bias=torch.zeros_like(rates)[:, None].expand(-1, width),
            dt_softplus=False,
        )
        return out[:, None], after
    out, after = _named(home, MAMBA_2.many)(
        value,
        step,
        rates,
        key,
        query,
        chunk_size=chunk,
        initial_states=state,
        return_final_states=True,
    )
    return out, after


def _mamba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    rates: Tensor,
    state: Tensor | None,
    home: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    # The one head has no dimension there, and tokens come last.
    query, key, value = (each[:, :, 0] for each in (query, key, value))
    if state is None:
        read = (each.transpose(1, 2) for each in (value, step))
        of_state = (each.transpose(1, 2) for each in (key, query))
        scan = _named(home, MAMBA.many)
        out, after = scan(*read, rates, *of_state, return_last_state=True)
        return out.transpose(1, 2)[:, :, None], after[:, None]
    after, found = state[:, 0].clone(memory_format=torch.contiguous_format), []
    for at in range(value.shape[1]):  # the scan begins with an empty state, whatever it is told
        tokens = (each[:, at] for each in (key, query))
        found.append(_named(home, MAMBA.one)(after, value[:, at], step[:, at], rates, *tokens))
    return torch.stack(found, dim=1)[:, :, None], after[:, None]


def _stepped(
    query: Tensor, key: Tensor, value: Tensor, step: Tensor, rates: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run token by token what the functions of the module compute, in fp32 and writing nothing in place."""
    wide = rates.dim() == 2
    copies = value.shape[2] // query.shape[2]
    query, key = (each.float().repeat_interleave(copies, dim=2) for each in (query, key))
    value, step, state, found = value.float(), step.float(), state.float(), []
    for at in range(value.shape[1]):
        width = step[:, at, None, :, None] if wide else step[:, at, :, None, None]
        decay = (width * (rates if wide else rates[:, None, None])).exp()
        state = decay * state + width * value[:, at, :, :, None] * key[:, at, :, None, :]
        found.append((state @ query[:, at, :, :, None])[..., 0])
    return torch.stack(found, dim=1), state


def _named(home: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(sys.modules[home], name)
    return found
