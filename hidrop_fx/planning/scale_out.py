"""A training step on several GPUs: bytes gathered and reduced, layer by layer, against arithmetic.

    p = plan("hidrop-64", model, batch_size=8, world_size=8, strategy="fsdp", bandwidth="nvlink")
    p.scale_out.speedup              # under these links, out of p.scale_out.possible
    print(p.scale_out)

Weights cost the same to gather however few tokens a layer computes, so that layers of text alone can wait for the link.
With P numbers of b bytes in a layer, N GPUs, and a link of B bytes a second that reaches a share e of it:

    gather  g = latency + P b (N-1)/N / (B e)             # ring all-gather; a reduce-scatter r alike, in the gradient's dtype
    compute c = FLOPs of the layer / (peak x efficiency)  # forward; backward twice that, three times where recomputed
    forward   = g_0 + sum_i max(c_i, g_{i+1})             # the gather of layer i+1 runs beside layer i
    backward  = g_L + sum_i max(2 c_i, g_{i-1} + r_{i+1}) + r_0

The step is that of the decoder's layers: no embedding, head, vision tower, optimizer or host time. A bound on what
overlap can do, not a forecast.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.planning.cluster import Cluster

RESTORED = 0.95
"""Share of the gain by FLOPs at which it counts as restored."""
_MOST_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """Seconds of one unit of layers in a step, a collective each for all of its weights."""

    forward: float
    backward: float
    gather: float
    """Before the forward pass."""
    regather: float
    """Before the backward pass; 0 where the weights stay gathered."""
    reduce: float
    """Of the gradients, behind the backward pass, on the same link."""
    between: float
    """Of the reduced gradients between nodes, on the link between them."""
    exposed: float = 0.0
    """Collectives that nothing runs beside, of both passes, which `forward` and `backward` hold already."""


@dataclass(frozen=True, kw_only=True)
class ScaleOut:
    """The step of a plan on a cluster. Made by `plan(..., world_size=...)` or `Costs.across`.

    FLOPs and tokens are those of one row; a GPU has `rows` of them.
    """

    cluster: Cluster
    rows: int
    layer_flops: tuple[int, ...]
    identity_flops: tuple[int, ...]
    """The same without a schedule."""
    tokens: tuple[int, ...]
    identity_tokens: tuple[int, ...]
    text_layers: int
    """So many first layers see text alone."""
    weights: int
    """Numbers in a layer, on average where layers differ."""
    weight_bytes: int
    """Of one number."""
    hidden_size: int

    def times(self, *, rows: int | None = None, first: int = 1) -> tuple[UnitTimes, ...]:
        """Return the times of each unit: a layer each, but the first `first` layers in one.

        Raises:
            HidropError: there are not so many layers.
        """
        return self._times(self.layer_flops, self.tokens, rows or self.rows, first)

    @cached_property
    def seconds(self) -> float:
        """Time of a step of the decoder's layers under the schedule, a unit a layer."""
        return step_seconds(self.times())

    @cached_property
    def identity_seconds(self) -> float:
        """The same without a schedule."""
        return self._identity_seconds(self.rows)

    @property
    def speedup(self) -> float:
        """Gain over the untouched model on the same cluster, with as many rows."""
        return self.identity_seconds / self.seconds

    @property
    def possible(self) -> float:
        """Gain if nothing waited for a link: that of the layers' FLOPs."""
        return sum(self.identity_flops) / sum(self.layer_flops)

    @property
    def breakeven_tokens(self) -> tuple[float, float] | None:
        """Tokens a GPU and layer whose arithmetic takes as long as the link, in forward and in backward.

        At `2 P` FLOPs a token; attention between tokens, which comes on top, is left out. None for tensor parallelism, whose
        traffic falls with the tokens.
        """
        if self.cluster.strategy == "tp":
            return None
        unit = self.times()[0]
        a_token = 2 * self.weights / self.cluster.computed
        return unit.gather / a_token, _link(unit) / (a_token * self.cluster.backward_passes)

    @property
    def below(self) -> tuple[int, ...]:
        """Layers that wait for the link in forward or backward, beside neighbours like themselves."""
        return tuple(i for i, unit in enumerate(self.times()) if _bound(unit) == "link")

    @cached_property
    def rows_to_restore(self) -> int | None:
        """Rows a GPU, the fewest with `RESTORED` of the gain by FLOPs; None if 4096 are not enough."""
        for rows in range(1, _MOST_ROWS + 1):
            ours = step_seconds(self.times(rows=rows))
            if self._identity_seconds(rows) / ours >= RESTORED * self.possible:
                return rows
        return None

    def grouped_seconds(self, first: int) -> float:
        """Return the time of a step in which the first `first` layers are one unit."""
        return step_seconds(self.times(first=first))

    @cached_property
    def shallow_group(self) -> int:
        """Of the first layers, which see text alone, how many make the fastest step as one unit; 1 if none do."""
        if not self.cluster.gathers:
            return 1
        return min(range(1, max(1, self.text_layers) + 1), key=self.grouped_seconds)

    def on(self, cluster: Cluster) -> "ScaleOut":
        """Return the same step on another cluster."""
        return replace(self, cluster=cluster)

    def alternatives(self) -> dict[str, tuple[float, float]]:
        """Return what else could be done: seconds that it saves a step, below 0 where it costs some, and the gain then."""
        found: dict[str, tuple[float, float]] = {}
        if not self.cluster.gathers:
            return found
        if self.text_layers > 1:
            group = self.shallow_group if self.shallow_group > 1 else self.text_layers
            seconds = self.grouped_seconds(group)
            found[f"layers 0-{group - 1} in one unit"] = (
                self.seconds - seconds,
                self.identity_seconds / seconds,
            )
        others = {"hybrid sharding": self.cluster.hybrid()}
        if self.cluster.reshard_after_forward:
            others["kept gathered"] = replace(self.cluster, reshard_after_forward=False)
        for name, cluster in others.items():
            if cluster is not None:
                other = self.on(cluster)
                found[name] = (self.seconds - other.seconds, self.identity_seconds / other.seconds)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        tokens = self.breakeven_tokens
        return {
            "cluster": asdict(self.cluster),
            "rows": self.rows,
            "units": [asdict(unit) for unit in self.times()],
            "seconds": self.seconds,
            "identity_seconds": self.identity_seconds,
            "speedup": self.speedup,
            "possible": self.possible,
            "breakeven_tokens": None
            if tokens is None
            else {"forward": tokens[0], "backward": tokens[1]},
            "below": list(self.below),
            "rows_to_restore": self.rows_to_restore,
            "shallow_group": self.shallow_group,
            "alternatives": {
                name: {"saved_seconds": saved, "speedup": gain}
                for name, (saved, gain) in self.alternatives().items()
            },
        }

    def __str__(self) -> str:
        each = "" if self.cluster.strategy == "tp" else " a GPU"
        lines = [
            f"a training step on {self.cluster}, {self.rows} row{'' if self.rows == 1 else 's'}{each}; ms",
            f"{'layers':>8}  {'tokens':>7}  {'forward':>8}  {'gather':>8}  {'backward':>8}  {'link':>8}  bound",
        ]
        units = self.times()
        for _, run in groupby(range(len(units)), lambda i: (self.tokens[i], _bound(units[i]))):
            layers = list(run)
            unit = units[layers[0]]
            forward, backward = (
                sum(getattr(units[i], name) for i in layers) / len(layers)
                for name in ("forward", "backward")
            )
            cells = (forward, unit.gather, backward, _link(unit))
            lines.append(
                f"{_span(layers):>8}  {self.rows * self.tokens[layers[0]]:>7}  "
                + "  ".join(f"{cell * 1e3:>8.3f}" for cell in cells)
                + f"  {_bound(unit)}"
            )
        lines.append(
            f"step of the layers: {self.seconds * 1e3:.1f} ms, identity {self.identity_seconds * 1e3:.1f} ms: "
            f"{self.speedup:.2f}x, of {self.possible:.2f}x by FLOPs"
        )
        tokens = self.breakeven_tokens
        if tokens is None:
            exposed = sum(unit.exposed for unit in units)
            lines.append(
                f"break-even: none; what is reduced falls with the tokens: {exposed * 1e3:.1f} ms, with nothing beside them"
            )
        else:
            below = f"{len(self.below)} of {len(units)} layers wait for the link"
            lines.append(
                f"break-even: {tokens[0]:.0f} tokens a GPU and layer forward, {tokens[1]:.0f} backward; {below}"
            )
        if self.rows_to_restore is None:
            lines.append(f"micro-batch: no {_MOST_ROWS} rows restore {RESTORED:.0%} of the gain")
        else:
            s = "" if self.rows_to_restore == 1 else "s"
            lines.append(
                f"micro-batch: {self.rows_to_restore} row{s}{each} for {RESTORED:.0%} of the gain"
            )
        for name, (saved, gain) in self.alternatives().items():
            verb = "saves" if saved >= 0 else "costs"
            lines.append(f"{name}: {verb} {abs(saved) * 1e3:.2f} ms a step, {gain:.2f}x")
        return "\n".join(lines)

    def _identity_seconds(self, rows: int) -> float:
        return step_seconds(self._times(self.identity_flops, self.identity_tokens, rows, 1))

    def _times(
        self, flops: Sequence[int], tokens: Sequence[int], rows: int, first: int
    ) -> tuple[UnitTimes, ...]:
        count = len(flops)
        if not 1 <= first <= count:
            raise HidropError(f"{first} first layers in one unit: there are 1 to {count} layers")
        return tuple(
            self._unit(sum(flops[i] for i in unit), sum(tokens[i] for i in unit), rows, len(unit))
            for unit in (range(first), *([i] for i in range(first, count)))
        )

    def _unit(self, flops: int, tokens: int, rows: int, layers: int) -> UnitTimes:
        c = self.cluster
        compute = rows * flops / c.computed
        if c.strategy == "tp":
            # Two all-reduces of the hidden states a layer and pass; nothing runs beside them.
            hidden = rows * tokens / layers * self.hidden_size * self.weight_bytes
            inside = 2 * layers * c.all_reduce_seconds(hidden)
            n = c.world_size
            passes = c.backward_passes
            backward = passes * compute / n + inside * (passes - 1)
            return UnitTimes(
                forward=compute / n + inside,
                backward=backward,
                gather=0.0,
                regather=0.0,
                reduce=0.0,
                between=0.0,
                exposed=passes * inside,
            )
        weights = layers * self.weights
        gradients = weights * (c.gradient_bytes or self.weight_bytes)
        gather = c.gather_seconds(weights * self.weight_bytes) if c.gathers else 0.0
        return UnitTimes(
            forward=compute,
            backward=c.backward_passes * compute,
            gather=gather,
            regather=gather if c.reshard_after_forward else 0.0,
            reduce=c.gather_seconds(gradients) if c.gathers else c.all_reduce_seconds(gradients),
            between=c.between_seconds(gradients),
        )


def step_seconds(units: Sequence[UnitTimes]) -> float:
    """Return the time of a forward and a backward pass, in which a unit's collectives run beside its neighbours' arithmetic.

    In forward the gather of unit i+1 runs beside unit i; in backward that of unit i-1 and the reduction of unit i+1, one after
    the other, run beside unit i, and on a link of its own what is reduced between nodes of unit i+2. A unit begins when
    all of these are done.
    """

    def at(place: int, name: str) -> float:
        return getattr(units[place], name) if 0 <= place < len(units) else 0.0

    last = len(units) - 1
    seconds = at(0, "gather") + at(last, "regather")
    for i in range(last + 1):
        seconds += max(at(i, "forward"), at(i + 1, "gather"))
        link = at(i - 1, "regather") + at(i + 1, "reduce")
        seconds += max(at(i, "backward"), link, at(i + 2, "between"))
    return seconds + max(at(0, "reduce"), at(1, "between")) + at(0, "between")


def _link(unit: UnitTimes) -> float:
    """Return the time of the links in backward, between neighbours like it."""
    return max(unit.regather + unit.reduce, unit.between)


def _bound(unit: UnitTimes) -> str:
    """Return "link" where a unit beside its like waits for it in either pass."""
    waits = unit.forward < unit.gather
    waits |= unit.backward < _link(unit)
    return "link" if waits else "compute"


def _span(layers: list[int]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
