"""Costs of a plan for a model and a sample: tokens per layer, FLOPs, KV bytes.

    p = plan("hidrop-64", model, text_tokens=64)
    p.tokens[10]        # text and vision tokens that layer 10 runs on
    p.layer_flops       # by layer
    print(p)            # a table, with the identity schedule beside it

Pure arithmetic over a `Plan`, the model's `Geometry` and a `Sample`: no tensor, no graph. What is printed of them is in
`cost_table.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.planning.cluster import Cluster
from hidrop_fx.planning.cost_table import as_dict, table
from hidrop_fx.planning.event_kinds import EVENT_KINDS
from hidrop_fx.planning.events import Event
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.planning.launch_counts import LaunchCounts
from hidrop_fx.planning.layer_kinds import LayerKind
from hidrop_fx.planning.plan import TEXT, Plan
from hidrop_fx.planning.roofline import Device, Roofline, Step, Work, device_of
from hidrop_fx.planning.sample import Run, Sample
from hidrop_fx.planning.scale_out import ScaleOut
from hidrop_fx.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A plan's costs for one model and one kind of sample. Made by `plan`.

    They are those of one sample's prefill, except `kv_bytes`, which is for the whole batch.
    """

    plan: Plan
    geometry: Geometry
    sample: Sample
    cluster: Cluster | None = None
    """What the plan was asked for with `world_size=...`."""

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def text_tokens(self) -> int:
        return self.sample.text_tokens

    @property
    def total_vision_tokens(self) -> int:
        """The sample's vision tokens before anything is pruned."""
        return self.sample.vision_tokens

    @property
    def entering_vision_tokens(self) -> int:
        """Those of them that reach the decoder."""
        if self.sample.entering is not None:
            return self.sample.entering
        return self.schedule.entering_tokens(self.sample.vision_tokens, self.sample.images)

    @property
    def images(self) -> int:
        return self.sample.images

    @property
    def batch_size(self) -> int:
        return self.sample.batch_size

    @property
    def new_tokens(self) -> int:
        return self.sample.new_tokens

    @cached_property
    def segment_vision_tokens(self) -> dict[str, int]:
        """Vision tokens of each segment of the plan, by its name."""
        entering = self.entering_vision_tokens
        kept = self.schedule.keep_counts(
            entering, self.sample.images, self.sample.units, num_layers=self.plan.num_layers
        )
        found = {TEXT: 0}
        for event in self.plan.events:
            kind = EVENT_KINDS[event.kind]
            found[event.name] = kind.vision_tokens(event, entering, kept)
        return found

    @cached_property
    def segments(self) -> tuple[Run, ...]:
        """Runs of layers that see the same tokens, in order; every event opens one."""
        runs = []
        for segment in self.plan.segments:
            if segment.layers:
                reason = segment.reason
                if reason == "inject" and segment.start == 0:
                    reason = "start"
                if self.schedule.reads is not None:
                    reason = "frozen"
                vision = self.segment_vision_tokens[segment.name]
                runs.append(Run(segment.start, segment.stop, vision, reason))
        return tuple(runs)

    @cached_property
    def vision_tokens(self) -> tuple[int, ...]:
        """Vision tokens that each layer runs on."""
        return tuple(self.segment_vision_tokens[layer.query] for layer in self.plan.layers)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """All tokens, text and vision, that each layer runs on."""
        return tuple(self.text_tokens + vision for vision in self.vision_tokens)

    @property
    def average_vision_tokens(self) -> float:
        """Vision tokens, averaged over all layers: the figure that methods are compared at."""
        return sum(self.vision_tokens) / self.geometry.num_layers

    @cached_property
    def layer_vision_flops(self) -> tuple[int, ...]:
        """The papers' count by layer: vision tokens only, and *one* FLOP per multiply-add.

        `4 n d^2 + 2 n^2 d + 3 n d m`, with n vision tokens, d hidden and m intermediate size: four
        square projections, vision-to-vision attention, a gated MLP. No text, no scoring, no grouped
        key-value heads. Of v tokens that are only read, two projections: `2 v d^2`. A recurrence is
        counted as in `layer_flops`.
        """
        d, m = self.geometry.hidden_size, self.geometry.intermediate_size
        counts = zip(self.vision_tokens, self._read_tokens, self._kinds, strict=True)
        return tuple(
            (4 * n * d**2 + 2 * n**2 * d + 2 * v * d**2) * kind.attends
            + n * (kind.mlp * d * m + kind.weights + kind.steps)
            for n, v, kind in counts
        )

    @property
    def vision_flops(self) -> int:
        """Sum of `layer_vision_flops`."""
        return sum(self.layer_vision_flops)

    @cached_property
    def layer_flops(self) -> tuple[int, ...]:
        """FLOPs of one sample's prefill in each layer, at *two* a multiply-add.

        Multiply-adds, with n = text + vision tokens of the layer, d hidden and m intermediate
        size, a = query heads x head_dim, c = key-value heads x head_dim:

        - projections: `2 n d a` (q, o) + `2 n d c` (k, v);
        - causal attention, text and vision together: `2 a n (n + 1) / 2` (q.k and p.v);
        - gated MLP: `3 n d m`;
        - a recurrence, in the place of attention or beside it: `n (weights + steps)` of its `LayerKind`;
        - of v vision tokens that are only read: `2 v d c` (k, v) and `2 a t v` (q.k and p.v of t text tokens);
        - of the events at its input, `event_flops`.

        Not counted: norms, softmax, RoPE, embedding, vision tower and projector.
        """
        g = self.geometry
        query_width = g.num_attention_heads * g.head_dim
        key_width = g.num_key_value_heads * g.head_dim
        flops = [0] * self.plan.num_layers
        for event in self.plan.events:
            flops[event.layer] += self.event_flops[event.name]
        for layer, (n, kind) in enumerate(zip(self.tokens, self._kinds, strict=True)):
            multiply_adds = n * (kind.mlp * g.hidden_size * g.intermediate_size)
            multiply_adds += n * (kind.weights + kind.steps)
            if kind.attends:
                multiply_adds += 2 * n * g.hidden_size * (query_width + key_width)
                multiply_adds += query_width * n * (n + 1)
                read = self._read_tokens[layer]
                multiply_adds += 2 * read * (g.hidden_size * key_width + query_width * n)
            flops[layer] += 2 * multiply_adds
        return tuple(flops)

    @cached_property
    def _kinds(self) -> tuple[LayerKind, ...]:
        return tuple(map(self.geometry.kind, range(self.plan.num_layers)))

    @cached_property
    def _read_tokens(self) -> tuple[int, ...]:
        """Vision tokens that each layer attends to beside those that are its rows."""
        counts = self.segment_vision_tokens
        return tuple(counts[layer.key] - counts[layer.query] for layer in self.plan.layers)

    @cached_property
    def event_flops(self) -> dict[str, int]:
        """FLOPs of each event itself, by its name, as its kind counts them; part of `layer_flops`."""
        found = {}
        for event in self.plan.events:
            multiply_adds = EVENT_KINDS[event.kind].multiply_adds
            found[event.name] = 2 * multiply_adds(event, self.geometry, *self._around(event))
        return found

    @property
    def head_flops(self) -> int:
        """FLOPs of the output head on the last row, which a prefill computes once."""
        return 2 * self.geometry.hidden_size * self.geometry.vocab_size

    @property
    def flops(self) -> int:
        """FLOPs of one sample's prefill in the decoder: `layer_flops` and the output head."""
        return sum(self.layer_flops) + self.head_flops

    @cached_property
    def cached_tokens(self) -> tuple[int, ...]:
        """Tokens of the prompt that each layer's cache holds, for each KV head; 0 where a layer does not attend."""
        held = zip(self._cached_by_attention, self._kinds, strict=True)
        return tuple(tokens * kind.attends for tokens, kind in held)

    @property
    def _cached_by_attention(self) -> tuple[int, ...]:
        cut, depth, counts = self.schedule.cut, self.plan.num_layers, self.segment_vision_tokens
        if self.schedule.bottleneck is not None:
            text, vision = self.sample.unseen or (0, self.entering_vision_tokens)
            held = [max(0, counts[layer.key] - vision) for layer in self.plan.layers]
            return tuple(self.text_tokens - text + vision for vision in held)
        tails = [self.plan.tail_of(layer) for layer in range(depth)]
        if cut is None:
            found = [
                self.text_tokens + counts[layer.cache if tail is None else tail.segment]
                for layer, tail in zip(self.plan.layers, tails, strict=True)
            ]
            return tuple(
                n if tail is None else min(n, tail.tokens)
                for n, tail in zip(found, tails, strict=True)
            )
        attended = [self.text_tokens + counts[layer.key] for layer in self.plan.layers]
        return tuple(cut.kept(n, layer, depth) for layer, n in enumerate(attended))

    @cached_property
    def layer_kv_bytes(self) -> tuple[int, ...]:
        """KV cache of the whole batch by layer, bytes: K and V of its own tokens + new tokens, and the state of a recurrence."""
        counts = zip(self.cached_tokens, self._rooms, self._state_bytes, strict=True)
        return tuple(self._token_bytes * n + room + state for n, room, state in counts)

    @property
    def kv_bytes(self) -> int:
        """Sum of `layer_kv_bytes`."""
        return sum(self.layer_kv_bytes)

    @cached_property
    def layer_weight_bytes(self) -> tuple[int, ...]:
        """Weights of each layer, bytes: four projections and a gated MLP, or what its kind has."""
        g = self.geometry
        widths = (g.num_attention_heads + g.num_key_value_heads) * g.head_dim
        return tuple(
            g.dtype_bytes
            * (
                g.hidden_size * (2 * widths * kind.attends + kind.mlp * g.intermediate_size)
                + kind.weights
            )
            for kind in self._kinds
        )

    @cached_property
    def prefill_work(self) -> tuple[Work, ...]:
        """Work of the whole batch's prefill, by run of layers, the output head last.

        FLOPs as in `layer_flops`; bytes: the weights once, and the keys and values written.
        """
        held = zip(self.layer_kv_bytes, self._rooms, strict=True)
        return self._work(self.layer_flops, [cached - room for cached, room in held])

    @cached_property
    def decode_work(self) -> tuple[Work, ...]:
        """Work of the first decode step behind the prompt, one token a row, by run of layers.

        Multiply-adds of a row: `2 d a + 2 d c` for the projections, `3 d m` for the MLP, `2 a n`
        for attention to the n tokens of the layer's cache, its own included; bytes: the weights
        once, and the cache. A recurrence: `weights + steps` of its `LayerKind`, and its state.
        """
        g = self.geometry
        query, key = (n * g.head_dim for n in (g.num_attention_heads, g.num_key_value_heads))
        projected = 2 * g.hidden_size * (query + key)
        flops, read = [], []
        for tokens, kind, state in zip(
            self.cached_tokens, self._kinds, self._state_bytes, strict=True
        ):
            n = tokens + kind.attends
            attention = (projected + 2 * query * n) * kind.attends
            mlp = kind.mlp * g.hidden_size * g.intermediate_size
            flops.append(2 * (attention + mlp + kind.weights + kind.steps))
            read.append(self._token_bytes * n + state)
        return self._work(flops, read)

    def on(self, device: str | Device, *, launches: LaunchCounts | None = None) -> Roofline:
        """Return the least time that a device needs for this prefill and for a decode step.

        Args:
            device: "h100", "h200", or a `Device` with its rates.
            launches: what `hidrop_fx.count_launches` found for this plan, to be held against the time.

        Raises:
            HidropError: no device of this name is known, or the launches are another plan's.
        """
        found = device_of(device)
        if launches is not None and len(launches.prefill.runs) != len(self.segments):
            raise HidropError(
                f"launches of {len(launches.prefill.runs)} runs of layers were counted for another plan than this "
                f"one of {len(self.segments)}; use hidrop_fx.count_launches(model, plan)"
            )
        return Roofline(
            device=found,
            prefill=Step(device=found, work=self.prefill_work),
            decode=Step(device=found, work=self.decode_work),
            identity_prefill=Step(device=found, work=self.identity.prefill_work),
            identity_decode=Step(device=found, work=self.identity.decode_work),
            launches=launches,
        )

    def across(self, cluster: Cluster) -> ScaleOut:
        """Return the time of a training step on several GPUs, each with a batch like this one (with "tp", all with the same).

        Raises:
            HidropError: the heads cannot be divided among the GPUs of tensor parallelism.
        """
        g = self.geometry
        if cluster.strategy == "tp" and g.num_key_value_heads % cluster.world_size:
            raise HidropError(
                f"strategy='tp' divides the {g.num_key_value_heads} key-value heads among world_size={cluster.world_size} GPUs: "
                "use a number that divides them"
            )
        return ScaleOut(
            cluster=cluster,
            rows=self.batch_size,
            layer_flops=self.layer_flops,
            identity_flops=self.identity.layer_flops,
            tokens=self.tokens,
            identity_tokens=self.identity.tokens,
            text_layers=next((i for i, n in enumerate(self.vision_tokens) if n), len(self.tokens)),
            weights=sum(self.layer_weight_bytes) // (g.dtype_bytes * len(self.tokens)),
            weight_bytes=g.dtype_bytes,
            hidden_size=g.hidden_size,
        )

    @cached_property
    def scale_out(self) -> ScaleOut | None:
        """The time of a training step on the cluster that the plan was asked for; None if it was asked for none."""
        return None if self.cluster is None else self.across(self.cluster)

    @cached_property
    def identity(self) -> "Costs":
        """Costs of the untouched model for the same sample, for ratios."""
        return Costs(
            plan=Plan.of(Schedule(), self.geometry.num_layers),
            geometry=self.geometry,
            sample=replace(self.sample, entering=None),
        )

    @property
    def token_layer_ratio(self) -> float:
        """Tokens summed over layers, identity / this plan: about the speed-up to be expected."""
        return sum(self.identity.tokens) / sum(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return plan, sample and costs as plain JSON types."""
        return as_dict(self)

    def __str__(self) -> str:
        return table(self)

    @property
    def _token_bytes(self) -> int:
        """Keys and values of one token in one layer, of the whole batch, bytes."""
        g = self.geometry
        return 2 * g.num_key_value_heads * g.head_dim * g.dtype_bytes * self.batch_size

    @cached_property
    def _rooms(self) -> tuple[int, ...]:
        """Part of each layer's `layer_kv_bytes` that waits for new tokens, bytes."""
        return tuple(self._token_bytes * self.new_tokens * kind.attends for kind in self._kinds)

    @cached_property
    def _state_bytes(self) -> tuple[int, ...]:
        """What each layer keeps of a recurrence, of the whole batch, bytes."""
        width = self.geometry.dtype_bytes
        return tuple(self.batch_size * (k.kept * width + k.state * 4) for k in self._kinds)

    def _work(self, row_flops: Sequence[int], layer_bytes: Sequence[int]) -> tuple[Work, ...]:
        """Sum the FLOPs of a row and the bytes of the batch over runs of layers; the head comes last."""
        g, work = self.geometry, []
        for run in self.segments:
            layers = range(run.start, run.stop)
            work.append(
                Work(
                    name=run.layers,
                    flops=self.batch_size * sum(row_flops[k] for k in layers),
                    bytes=sum(self.layer_weight_bytes[k] + layer_bytes[k] for k in layers),
                )
            )
        if g.vocab_size:
            weights = g.hidden_size * g.vocab_size * g.dtype_bytes
            work.append(Work(name="head", flops=self.batch_size * self.head_flops, bytes=weights))
        return tuple(work)

    def _around(self, event: Event) -> tuple[int, int]:
        """Return the number of tokens before and after an event."""
        segment = self.plan.opened_by(event)
        assert segment.parent is not None
        counts = self.segment_vision_tokens
        return (
            self.text_tokens + counts[segment.parent],
            self.text_tokens + counts[segment.name],
        )
