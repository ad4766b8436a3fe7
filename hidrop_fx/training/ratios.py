"""The learned pruning ratios of a schedule with `selection="dtopk"`.

    kept(row) = ceil(N * (1 - a))        # of the N vision tokens that reach the filter layer
    loss     += budget_weight * (average(a) / average(a at the start) - 1) ** 2

The ratios start at what the schedule keeps of one image; where it keeps counts, rows with any number of
images start with just these. One ratio `a` a filter layer: the share of its tokens that it drops, as in HiDrop's differentiable
top-k (section 3.2 of the paper; the released code keeps `a` constant and passes no gradient).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import HidropError
from hidrop_fx.planning import Costs, Plan


class Ratios(nn.Module):
    """Ratios [F], fp32, one a filter layer, in the order of `layers`.

    Their module is part of the model, so that optimizers, DDP and `.to(device)` find them, but not of
    its state dict, which stays that of the original class. They keep fp32 whatever the model's dtype.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.layers = tuple(costs.schedule.prune)
        self.weight = costs.schedule.budget_weight
        kept = [costs.vision_tokens[layer] for layer in self.layers]
        before = [costs.total_vision_tokens, *kept]
        ratios = [1 - n / present for n, present in zip(kept, before, strict=False)]
        self.values = nn.Parameter(torch.tensor(ratios, dtype=torch.float32, device="cpu"))
        self._spans = _spans(costs.plan)
        self._start = float(self._average(self.values.detach()))

    def __getitem__(self, layer: int) -> Tensor:
        return self.whole()[self.layers.index(layer)]

    def whole(self) -> Tensor:
        """Return the ratios [F], gathered from all processes where `fully_shard` shards them: a collective then.

        Raises:
            HidropError: they were rounded to another dtype.
        """
        values: Tensor = self.values
        if values.dtype != torch.float32:
            raise HidropError(
                f"the learned ratios are gathered in {values.dtype}, in which a ratio is off by whole tokens; give them a unit "
                "of their own, fully_shard(model.hidrop_ratios, mesh=mesh), before the whole model is sharded under a "
                "MixedPrecisionPolicy"
            )
        return _gathered(values) if hasattr(values, "full_tensor") else values

    @torch.no_grad()
    def set(self, layer: int, value: Tensor) -> None:
        """Set the ratio of a filter layer; on every process where they are sharded."""
        whole = self.whole().detach().clone()
        whole[self.layers.index(layer)] = value.to(whole.device)
        sharded: Any = self.values
        if hasattr(sharded, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, sharded.device_mesh, sharded.placements)
        sharded.copy_(whole)

    def numbers(self) -> dict[int, float]:
        """Return the ratio of each filter layer, on the host.

        Raises:
            HidropError: one is no number.
        """
        found = dict(zip(self.layers, self.whole().tolist(), strict=True))
        for layer, ratio in found.items():
            if not math.isfinite(ratio):
                raise HidropError(
                    f"the learned ratio of filter layer {layer} is {ratio}: an optimizer step took a loss "
                    "or gradient that was no number (a batch without a supervised token gives one); leave "
                    "such steps out, and load the last checkpoint with hidrop_fx.load"
                )
        return found

    def penalty(self) -> Tensor:
        """Return the budget term of the loss, a scalar."""
        share = self._average(self.whole()) / self._start
        return self.weight * (share - 1).square()

    def _average(self, ratios: Tensor) -> Tensor:
        """Return the average over all layers of the share of a sample's vision tokens that a layer sees."""
        total = ratios.new_zeros(())
        alive = ratios.new_ones(())
        for layers, filtered in self._spans:
            if filtered is not None:
                alive = alive * (1 - ratios[filtered])
            total = total + layers * alive
        return total

    def _apply(self, fn: Any, recurse: bool = True) -> "Ratios":
        values, gradient = self.values.data, self.values.grad
        gradient = None if gradient is None else gradient.detach()
        super()._apply(fn, recurse)
        if self.values.dtype != torch.float32:  # not by way of bf16, which would round them
            device = self.values.device
            self.values.data = values.to(device)
            self.values.grad = None if gradient is None else gradient.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def _gathered(values: Any) -> Tensor:
    """Return a DTensor's whole values; its gradient is the mean of those of all processes, as FSDP2 makes it."""
    from torch.distributed.tensor import Partial

    mesh = values.device_mesh
    whole: Tensor = values.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _spans(plan: Plan) -> list[tuple[int, int | None]]:
    """Return the runs of layers with vision tokens: how many layers, and which ratio starts them."""
    filters = {event.name: index for index, event in enumerate(plan.of_kind("prune"))}
    return [
        (len(segment.layers), filters.get(segment.name))
        for segment in plan.segments
        if segment.reason in ("inject", "prune")
    ]
