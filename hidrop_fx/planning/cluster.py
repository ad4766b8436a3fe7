"""GPUs and the links between them, as far as the time of a training step depends on them.

Cluster(world_size=16, strategy="fsdp", bandwidth="nvlink", node_bandwidth="400gb")

Peaks come from data sheets, and each is taken times an efficiency. The efficiencies and the latency are assumptions; none was
measured here.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from hidrop_fx.errors import HidropError

Strategy = Literal["ddp", "fsdp", "zero3", "hsdp", "tp"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
LINKS: dict[str, float] = {
    "nvlink": 450e9,
    "nvlink3": 300e9,
    "pcie5": 64e9,
    "pcie4": 32e9,
    "400gb": 50e9,
    "200gb": 25e9,
    "100gb": 12.5e9,
}
"""Bytes a second of a GPU in one direction: NVLink of an H100 and of an A100, PCIe with 16 lanes, one network card a GPU."""
H100_FLOPS = 989e12
"""16-bit matrix products without sparsity, two FLOPs a multiply-add: the data sheet's peak of an H100 SXM."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind, in nodes of equal size.

    Raises:
        HidropError: a value that is none of these, with those that are.
    """

    world_size: int
    """GPUs, one process each."""
    strategy: str = "fsdp"
    """"ddp": whole weights everywhere, gradients all-reduced. "fsdp" and "zero3": weights gathered layer by layer, gradients
    reduce-scattered, over all GPUs. "hsdp": so within each node, and gradients all-reduced between nodes. "tp": each
    layer's matrices divided among the GPUs."""
    bandwidth: float | str = "nvlink"
    """Of the link within a node, bytes a second and GPU in one direction, or a name in `LINKS`."""
    node_size: int = 8
    """GPUs of a node."""
    node_bandwidth: float | str | None = None
    """Of the link between nodes, a GPU's share of it; None where `bandwidth` holds for all."""
    flops: float = H100_FLOPS
    """Peak of a GPU."""
    efficiency: float = 0.5
    """Share of the peak that a layer reaches."""
    link_efficiency: float = 0.75
    """Share of `bandwidth` that a collective reaches."""
    node_link_efficiency: float = 0.85
    """Share of `node_bandwidth` that one reaches."""
    latency: float = 20e-6
    """What a collective takes beside its bytes, seconds."""
    gradient_bytes: int | None = None
    """Of a number in what is reduced; None for those of a weight (4 under `MixedPrecisionPolicy(reduce_dtype=float32)`)."""
    reshard_after_forward: bool = True
    """False keeps layers gathered until backward."""
    recompute: bool = False
    """Compute the forward pass of each layer once more in backward (gradient checkpointing)."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise HidropError(f"strategy={self.strategy!r}; use one of {', '.join(STRATEGIES)}")
        for name in ("bandwidth", "node_bandwidth"):
            object.__setattr__(self, name, _rate(name, getattr(self, name)))
        for name in ("world_size", "node_size", "gradient_bytes"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise HidropError(f"{name}={value!r} must be an integer of 1 or more")
        for name in (f.name for f in fields(self) if f.name.endswith("efficiency")):
            if not 0 < getattr(self, name) <= 1:
                raise HidropError(f"{name}={getattr(self, name)!r} must be above 0 and at most 1")
        if not self.flops > 0 or self.latency < 0:
            raise HidropError(
                f"flops={self.flops!r} must be above 0, latency={self.latency!r} 0 or more"
            )
        if self.strategy == "hsdp" and (self.world_size % self.node_size or self.nodes < 2):
            raise HidropError(
                f"strategy='hsdp' shards within nodes and replicates between them: world_size={self.world_size} must be a "
                f"multiple of node_size={self.node_size}, twice that or more; use 'fsdp' in one node"
            )
        if self.strategy == "hsdp" and self.node_bandwidth is None:
            raise HidropError(
                "strategy='hsdp' reduces between nodes: pass node_bandwidth=..., such as '400gb'"
            )

    @property
    def nodes(self) -> int:
        """Nodes, the last maybe not full."""
        return -(-self.world_size // self.node_size)

    @property
    def computed(self) -> float:
        """FLOPs a second that a layer reaches."""
        return self.flops * self.efficiency

    @property
    def backward_passes(self) -> int:
        """Arithmetic of backward in that of forward."""
        return 3 if self.recompute else 2

    @property
    def gathers(self) -> bool:
        """True where weights are sharded."""
        return self.strategy in ("fsdp", "zero3", "hsdp")

    @property
    def shards(self) -> int:
        """GPUs that share the weights, or the gradients of "ddp"."""
        return self.node_size if self.strategy == "hsdp" else self.world_size

    def gather_seconds(self, size: float) -> float:
        """Return the time of a ring all-gather or reduce-scatter of `size` bytes in all: each GPU passes on (N-1)/N of them."""
        n = self.shards
        return 0.0 if n == 1 else self.latency + size * (n - 1) / n / self._ring

    def all_reduce_seconds(self, size: float) -> float:
        """Return the time of a ring all-reduce of `size` bytes over the same GPUs: a reduce-scatter and an all-gather."""
        n = self.shards
        return 0.0 if n == 1 else self.latency + 2 * size * (n - 1) / n / self._ring

    def between_seconds(self, size: float) -> float:
        """Return the time of the all-reduce of a shard of `size` bytes between nodes; 0 where shards span them."""
        if self.strategy != "hsdp":
            return 0.0
        m = self.nodes
        return self.latency + 2 * size / self.node_size * (m - 1) / m / self._between

    def hybrid(self) -> "Cluster | None":
        """Return the cluster with hybrid sharding, where weights are sharded over several nodes whose link is known."""
        whole = self.world_size % self.node_size == 0 and self.nodes > 1
        if self.strategy in ("fsdp", "zero3") and whole and self.node_bandwidth is not None:
            return replace(self, strategy="hsdp")
        return None

    @property
    def _within(self) -> float:
        assert isinstance(self.bandwidth, float)
        return self.bandwidth * self.link_efficiency

    @property
    def _between(self) -> float:
        assert isinstance(self.node_bandwidth, float)
        return self.node_bandwidth * self.node_link_efficiency

    @property
    def _ring(self) -> float:
        """Bytes a second of the slowest link of a ring over the shards."""
        crosses = self.strategy != "hsdp" and self.nodes > 1 and self.node_bandwidth is not None
        return min(self._within, self._between) if crosses else self._within

    def __str__(self) -> str:
        assert isinstance(self.bandwidth, float)
        links = f"{self.bandwidth / 1e9:g} GB/s x {self.link_efficiency:g}"
        if isinstance(self.node_bandwidth, float) and self.nodes > 1:
            links = (
                f"{links} within nodes of {self.node_size}, {self.node_bandwidth / 1e9:g} GB/s x "
                f"{self.node_link_efficiency:g} between them"
            )
        rest = "".join(
            f", {text}"
            for text, said in (
                ("recomputed", self.recompute),
                ("kept gathered", self.gathers and not self.reshard_after_forward),
            )
            if said
        )
        return (
            f"{self.world_size} GPU{'' if self.world_size == 1 else 's'} ({self.strategy}{rest}), {links}, "
            f"{self.flops / 1e12:g} TFLOP/s x {self.efficiency:g}"
        )


def _rate(name: str, given: float | str | None) -> float | None:
    """Return a rate in bytes a second.

    Raises:
        HidropError: it is neither a rate nor the name of a link.
    """
    if given is None and name == "node_bandwidth":
        return None
    try:
        found = LINKS[given.lower()] if isinstance(given, str) and given.lower() in LINKS else given
        rate = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise HidropError(
            f"{name}={given!r} is no rate in bytes a second above 0, such as 450e9, and none of {', '.join(LINKS)}"
        )
    return rate
