"""In-place operators as functions: the same values as torch computes in place, or nothing is changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hidrop_fx.capture.functional import is_write, write_as_functions
from hidrop_fx.ops.functional import copied

Code = Callable[[Tensor], Any]


class Module(nn.Module):
    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.code(x)


def traced(code: Code) -> fx.GraphModule:
    made = torch.export.export(Module(code).eval(), (torch.rand(4, 6),), strict=False)
    return made.graph_module


def ran(module: fx.GraphModule, x: Tensor) -> Any:
    return fx.Interpreter(module).run(x)


def check(code: Code) -> fx.Graph:
    """Compare with the code itself; returns the graph."""
    module = traced(code)
    assert any(map(is_write, module.graph.nodes))
    assert write_as_functions(module.graph)
    module.graph.lint()
    assert not any(map(is_write, module.graph.nodes))
    x = torch.rand(4, 6)
    # A view of other strides is summed in another order.
    torch.testing.assert_close(ran(module, x.clone()), tuple(code(x.clone())))
    for node in module.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta
    return module.graph


def into_a_part(x: Tensor) -> Any:
    """As RoPE of several axes is interleaved: the other rows are read behind it."""
    freqs = x * 2
    first = freqs[0]
    first[1:6:3] = freqs[1, 1:6:3]
    first[2:6:3] = freqs[2, 2:6:3]
    return first.cos(), freqs[1], freqs.sum()


def into_an_empty_one(x: Tensor) -> Any:
    """As experts' outputs are put back into their order, and as keys are put together of two halves."""
    order = torch.arange(3, -1, -1)
    made = torch.empty_like(x * 1)
    made[order] = x * 3
    halves = x.new_empty(4, 8)
    halves[:, :2] = x[:, :2]
    halves[:, 2:] = x
    return made, halves


def normalised(x: Tensor) -> Any:
    weights = x.gather(1, torch.zeros(4, 2, dtype=torch.int64))
    weights /= weights.sum(-1, keepdim=True)
    best, _ = x.topk(2)
    best /= best.sum(-1, keepdim=True)
    mask = torch.zeros_like(x).scatter_(1, torch.zeros(4, 1, dtype=torch.int64), 1)
    return weights, best, mask.reshape(-1)


def seen_through_older_views(x: Tensor) -> Any:
    made = x + 1
    turned, (low, high), (first, *_) = made.transpose(0, 1), made.split(3, dim=1), made.unbind()
    before = turned.sum()
    made[0].mul_(2)
    return before, turned * 1, low * 1, high.unsqueeze(0) + 0, first * 1, made


def into_a_part_of_a_split(x: Tensor) -> Any:
    low, high = (x + 1).split(3, dim=1)
    return low.add_(high), high * 1


def of_its_own_memory(x: Tensor) -> Any:
    made = x + 1
    made[0].copy_(made[1])
    made[2] += made[0]
    return (made,)


def in_a_chain(x: Tensor) -> Any:
    made = (x + 1).mul_(2).add_(x)
    again = made.clamp_(max=2)
    made[:, 0].zero_()
    return again * 1, made


@pytest.mark.parametrize(
    "code",
    [
        into_a_part,
        into_an_empty_one,
        normalised,
        seen_through_older_views,
        of_its_own_memory,
        in_a_chain,
    ],
)
def test_values_are_those_of_writes_in_place(code: Code) -> None:
    check(code)


def unchanged(code: Code) -> None:
    """Check that the graph is left as it was."""
    module = traced(code)
    before = str(module.graph)
    assert not write_as_functions(module.graph)
    assert str(module.graph) == before


def into_an_input(x: Tensor) -> Any:
    return (x.add_(1),)


def into_what_may_be_an_input(x: Tensor) -> Any:
    return nn.functional.dropout(x, training=False).add_(1), x * 1


def behind_what_may_be_a_copy(x: Tensor) -> Any:
    made = x + 1
    flat = made.reshape(-1)
    made.mul_(2)
    return flat * 1, made


def through_a_turned_view(x: Tensor) -> Any:
    made = x + 1
    made.t()[0].mul_(2)
    return (made,)


def of_another_dtype(x: Tensor) -> Any:
    return ((x + 1).mul_(x.double()),)


def turned_in_place(x: Tensor) -> Any:
    return ((x + 1).t_().sum(0),)


@pytest.mark.parametrize(
    "code",
    [
        into_an_input,
        into_a_part_of_a_split,
        turned_in_place,
        into_what_may_be_an_input,
        behind_what_may_be_a_copy,
        through_a_turned_view,
        of_another_dtype,
    ],
)
def test_what_is_not_known_is_left_to_torch(code: Code) -> None:
    unchanged(code)


def test_a_graph_without_writes_stays_as_it_is() -> None:
    module = traced(lambda x: (x.sin(),))
    before = str(module.graph)
    assert write_as_functions(module.graph)
    assert str(module.graph) == before


def drawn(seed: int) -> Code:
    """Return code that takes views of one tensor, writes to some of them and reads others, drawn at random."""

    def code(x: Tensor) -> Any:
        choose = random.Random(seed)
        root = x + 1
        written, views, read = [root], [root], []
        for step in range(14):
            kind = choose.choice(("slice", "select", "turn", "write", "write", "read"))
            if kind in ("slice", "select"):
                base = choose.choice(written)
                dim = choose.randrange(base.dim()) if base.dim() else 0
                if base.dim() == 0 or base.shape[dim] < 2:
                    continue
                start = choose.randrange(base.shape[dim] - 1)
                where = start if kind == "select" else slice(start, start + 2)
                made = base[(slice(None),) * dim + (where,)]
                written.append(made)
                views.append(made)
            elif kind == "turn":
                views.append(choose.choice(views).unsqueeze(0).transpose(0, -1))
            elif kind == "write":
                target = choose.choice(written)
                with_what = choose.choice(views).sum()
                how = choose.randrange(3)
                if how == 0:
                    target.mul_(0.5)
                elif how == 1:
                    target.add_(with_what)
                else:
                    target.copy_(with_what.expand(target.shape))
            else:
                read.append(choose.choice(views) * (step + 1))
        return *read, root * 1, *(view * 1 for view in views)

    return code


def test_values_of_views_and_writes_drawn_at_random_are_those_in_place() -> None:
    tried = 0
    for seed in range(40):
        code = drawn(seed)
        if any(map(is_write, traced(code).graph.nodes)):
            check(code)
            tried += 1
    assert tried > 25


def test_gradients_are_those_of_writes_in_place() -> None:
    module = traced(into_a_part)
    assert write_as_functions(module.graph)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        node.target = copied
    x, y = (torch.ones(4, 6).mul_(0.3).requires_grad_() for _ in range(2))
    sum(value.sum() for value in ran(module, x)).backward()
    sum(value.sum() for value in into_a_part(y)).backward()
    torch.testing.assert_close(x.grad, y.grad)
