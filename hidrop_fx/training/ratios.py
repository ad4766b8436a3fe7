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

from hidrop_fx.capture.zero3 import (
    gathered,
    has_master,
    is_partition,
    master,
    set_master,
    whole_shape,
)
from hidrop_fx.errors import HidropError
from hidrop_fx.planning import Costs, Plan


class Ratios(nn.Module):
    """Ratios [F], fp32, one a filter layer, in the order of `layers`.

    Their module is part of the model, so that optimizers, DDP and `.to(device)` find them, but not of
    its state dict, which stays that of the original class. They keep fp32 whatever the model's dtype.
    """

    _sharded: Any = None
    """The parameter as `fully_shard` keeps it between calls; None where it shards none."""
    _held: Tensor | None = None
    """The whole ratios, from `hold` to the next training step."""

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

    def __setattr__(self, name: str, value: Any) -> None:
        """Note the sharded parameter, which FSDP2 puts here whenever it has freed the gathered one."""
        super().__setattr__(name, value)
        if name == "values" and hasattr(value, "full_tensor"):
            self.__dict__["_sharded"] = value

    def __getitem__(self, layer: int) -> Tensor:
        return self.whole()[self.layers.index(layer)]

    @property
    def mesh(self) -> Any:
        """The device mesh over which `fully_shard` shards the ratios; None if it does not."""
        return None if self._sharded is None else self._sharded.device_mesh

    @property
    def shared(self) -> bool:
        """True where each process has a part of the ratios: `fully_shard` or ZeRO-3 shards them, or ZeRO-2 their fp32 values."""
        parts = (self._sharded, self._partition, self._rounded)
        return any(part is not None for part in parts)

    @property
    def _partition(self) -> Tensor | None:
        """The parameter where ZeRO-3 partitions it, gathered or not."""
        values: Tensor = self._parameters.get("values")  # type: ignore[assignment]
        return values if is_partition(values) else None

    @property
    def _rounded(self) -> Tensor | None:
        """The parameter where DeepSpeed has made it one of 16 bits, and keeps its fp32 values in the optimizer."""
        values: Tensor = self._parameters.get("values")  # type: ignore[assignment]
        found = values.dtype != torch.float32 and has_master(values)
        return values if found and values.requires_grad else None

    def whole(self) -> Tensor:
        """Return the ratios [F] in fp32, gathered from all processes where an engine shards them: a collective then.

        Raises:
            HidropError: they were rounded to another dtype.
        """
        if torch.is_grad_enabled():
            self._held = None
        if self._whole_here:
            values: Tensor = self.values
            return values
        if self._rounded is not None:
            exact = master(self._rounded)
            if not torch.is_grad_enabled():
                return exact
            near = self.values.float()
            return near + (exact - near.detach())
        if self._sharded is None and self.values.dtype == torch.float32:
            return self.now()
        if self._sharded is None:
            raise HidropError(
                f"the learned ratios are in {self.values.dtype}, in which a ratio is off by whole tokens; they must be fp32"
            )
        # Not as a MixedPrecisionPolicy may have rounded them for the call.
        return _gathered(self._sharded) if torch.is_grad_enabled() else self.now()

    @property
    def _whole_here(self) -> bool:
        """True if this process holds all of them now, and unrounded."""
        values = self.values  # in a call of the model ZeRO-3 gathers what is read
        here = not hasattr(values, "full_tensor") and values.shape == whole_shape(values)
        return values.dtype == torch.float32 and here

    def now(self) -> Tensor:
        """Return the ratios [F] as they are, without a gradient; a collective where they are sharded and not at hand."""
        if self._held is not None:
            return self._held
        with torch.no_grad():
            if self._rounded is not None:
                return master(self._rounded)
            if self._partition is not None and not self._whole_here:
                with gathered([self._partition]):
                    return self._partition.detach().clone()
            return (self.whole() if self._sharded is None else _gathered(self._sharded)).detach()

    def hold(self) -> None:
        """Gather sharded ratios in every process, so that one of them can save before the next training step."""
        if self.shared:
            self._held = None
            self._held = self.now()

    @property
    def at_hand(self) -> bool:
        """True if `now` needs no other process."""
        return not self.shared or self._held is not None

    @torch.no_grad()
    def set(self, layer: int, value: Tensor) -> None:
        """Set the ratio of a filter layer; on every process where they are sharded.

        Raises:
            HidropError: the optimizer of ZeRO-3 has another, which it would go on with.
        """
        before = self.now()
        whole = before.clone()
        whole[self.layers.index(layer)] = value.to(whole.device)
        self._held = None
        values: Any = self._parameters.get("values") if self._sharded is None else None
        if values is not None and has_master(values):
            if torch.equal(before, whole):  # as it was loaded with the optimizer's state
                return
            set_master(values, whole)
        if self._sharded is not None:
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = self._sharded.device_mesh, self._sharded.placements
            self._sharded.copy_(distribute_tensor(whole, mesh, placements))
        if self._partition is not None:
            with gathered([self._partition]):
                self._partition.copy_(whole)
        elif self._whole_here or self._rounded is not None:
            self.values.copy_(whole)

    def numbers(self) -> dict[int, float]:
        """Return the ratio of each filter layer, on the host.

        Raises:
            HidropError: one is no number.
        """
        values = self.whole().detach() if self._whole_here else self.now()
        found = dict(zip(self.layers, values.tolist(), strict=True))
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
        # accelerate empties a model so, and fills what is in its state dict again.
        if fn(self.values).is_meta:
            return self
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
