"""What a schedule means for a model and a sample: segments, tokens per layer, FLOPs, KV bytes.

    p = plan("hidrop-64", model, text_tokens=64)
    p.segments          # runs of layers that see the same tokens
    p.tokens[10]        # text and vision tokens that layer 10 runs on
    print(p)            # a table, with the identity schedule beside it

Pure arithmetic: no tensor, no graph. The graph passes take their token counts from here.
"""

import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.planning.geometry import Geometry, sizes_of, vision_tokens_per_image, with_defaults
from hidrop_fx.schedule.schedule import Schedule, checked_int, keep_count

__all__ = ["DEFAULT_TEXT_TOKENS", "Plan", "Segment", "plan"]

DEFAULT_TEXT_TOKENS = 64
"""LLaVA-1.5's system prompt and a short question."""

logger = logging.getLogger("hidrop_fx")


@dataclass(frozen=True)
class Segment:
    """Layers `start` .. `stop - 1`, which see the same tokens.

    Every event opens one, also a prune that finds nothing left to remove.
    """

    start: int
    stop: int
    vision_tokens: int
    reason: str
    """What opens it: "start" or "text" (the first layers, with or without vision tokens), "inject",
    "prune" (also when it falls on the layer of an inject) or "exit"."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule resolved for one model and one kind of sample. Made by `plan`.

    Costs are those of one sample's prefill, but for `kv_bytes`, which is for the whole batch.
    """

    schedule: Schedule
    geometry: Geometry
    text_tokens: int
    total_vision_tokens: int
    """The sample's vision tokens before anything is pruned."""
    images: int
    batch_size: int
    new_tokens: int
    """Tokens to be generated: room for them is part of `kv_bytes`."""
    segments: tuple[Segment, ...]

    @cached_property
    def vision_tokens(self) -> tuple[int, ...]:
        """Vision tokens that each layer runs on."""
        return tuple(s.vision_tokens for s in self.segments for _ in range(s.start, s.stop))

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """All tokens, text and vision, that each layer runs on."""
        return tuple(self.text_tokens + vision for vision in self.vision_tokens)

    @property
    def average_vision_tokens(self) -> float:
        """Vision tokens, averaged over all layers: the figure that methods are compared at."""
        return sum(self.vision_tokens) / self.geometry.num_layers

    @property
    def vision_flops(self) -> int:
        """The papers' count: vision tokens only, and *one* FLOP per multiply-add.

        Per layer `4 n d^2 + 2 n^2 d + 3 n d m`, with n vision tokens, d hidden and m intermediate
        size: four square projections, vision-to-vision attention, a gated MLP. No text, no
        scoring, no grouped key-value heads.
        """
        d, m = self.geometry.hidden_size, self.geometry.intermediate_size
        return sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in self.vision_tokens)

    @property
    def flops(self) -> int:
        """What the prefill of one sample computes in the decoder: *two* FLOPs per multiply-add.

        Multiply-adds, with n = text + vision tokens of the layer, d hidden and m intermediate
        size, a = query heads x head_dim, c = key-value heads x head_dim:

        - projections: `2 n d a` (q, o) + `2 n d c` (k, v);
        - causal attention, text and vision together: `2 a n (n + 1) / 2` (q.k and p.v);
        - gated MLP: `3 n d m`;
        - a filter layer that prunes N tokens to n: what its scorer counts; for a score by attention
          `(N - n) d c`, the keys of the dropped tokens, + `N a`, one query row against all keys (its q
          is projected with the others);
        - once, the output head on the last row: `d * vocab_size`.

        Not counted: norms, softmax, RoPE, embedding, vision tower and projector.
        """
        g = self.geometry
        query_width = g.num_attention_heads * g.head_dim
        key_width = g.num_key_value_heads * g.head_dim
        multiply_adds = g.hidden_size * g.vocab_size
        for n in self.tokens:
            multiply_adds += 2 * n * g.hidden_size * (query_width + key_width)
            multiply_adds += query_width * n * (n + 1)
            multiply_adds += 3 * n * g.hidden_size * g.intermediate_size
        for layer in self.schedule.prune:
            present = self._tokens_before(layer)
            dropped = present - self.tokens[layer]
            multiply_adds += self.schedule.scorer.multiply_adds(present, dropped, g)
        return 2 * multiply_adds

    @property
    def kv_bytes(self) -> int:
        """Memory of the whole batch's KV caches: K and V of each layer's own tokens + new tokens."""
        g = self.geometry
        cached = sum(n + self.new_tokens for n in self.tokens)
        return 2 * g.num_key_value_heads * g.head_dim * cached * g.dtype_bytes * self.batch_size

    @property
    def identity(self) -> "Plan":
        """The plan of the untouched model for the same sample, for ratios."""
        return _resolve(
            Schedule(),
            self.geometry,
            text_tokens=self.text_tokens,
            total_vision_tokens=self.total_vision_tokens,
            images=self.images,
            batch_size=self.batch_size,
            new_tokens=self.new_tokens,
        )

    @property
    def token_layer_ratio(self) -> float:
        """Tokens summed over layers, identity / this plan: about the speed-up to be expected."""
        return sum(self.identity.tokens) / sum(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Everything, costs included, as what JSON can hold."""
        return {
            "schedule": self.schedule.to_dict(),
            "geometry": asdict(self.geometry),
            "text_tokens": self.text_tokens,
            "total_vision_tokens": self.total_vision_tokens,
            "images": self.images,
            "batch_size": self.batch_size,
            "new_tokens": self.new_tokens,
            "segments": [asdict(segment) for segment in self.segments],
            "vision_tokens": list(self.vision_tokens),
            "tokens": list(self.tokens),
            **self._costs(),
            "token_layer_ratio": self.token_layer_ratio,
            "identity": self.identity._costs(),
        }

    def __str__(self) -> str:
        g = self.geometry
        lines = [
            f"schedule  {self.schedule}",
            f"model     {g.num_layers} layers, hidden {g.hidden_size}, MLP {g.intermediate_size}, "
            f"{g.num_attention_heads} heads ({g.num_key_value_heads} key-value) of {g.head_dim}",
            f"sample    {self.text_tokens} text + {self.total_vision_tokens} vision tokens, "
            f"{self.images} image{'' if self.images == 1 else 's'}; batch {self.batch_size}, "
            f"{self.new_tokens} new tokens",
            "",
            f"{'layers':>8}  {'event':<6}  {'vision':>7}  {'tokens':>7}",
        ]
        for s in self.segments:
            layers = f"{s.start}" if s.stop == s.start + 1 else f"{s.start}-{s.stop - 1}"
            total = self.text_tokens + s.vision_tokens
            lines.append(f"{layers:>8}  {s.reason:<6}  {s.vision_tokens:>7}  {total:>7}")

        lines += ["", f"{'':<28}  {'plan':>10}  {'identity':>10}  {'ratio':>7}"]
        ours, theirs = self._costs(), self.identity._costs()
        for label, key, unit, digits in (
            ("vision tokens per layer", "average_vision_tokens", 1, 1),
            ("token-layers", "token_layers", 1, 0),
            ("vision TFLOPs (papers')", "vision_flops", 1e12, 3),
            ("prefill TFLOPs", "flops", 1e12, 3),
            ("KV cache MiB", "kv_bytes", 2**20, 1),
        ):
            ratio = f"{theirs[key] / ours[key]:.2f}x" if ours[key] else "-"
            left, right = (f"{costs[key] / unit:.{digits}f}" for costs in (ours, theirs))
            lines.append(f"{label:<28}  {left:>10}  {right:>10}  {ratio:>7}")
        return "\n".join(lines)

    def _costs(self) -> dict[str, float]:
        return {
            "average_vision_tokens": self.average_vision_tokens,
            "token_layers": sum(self.tokens),
            "vision_flops": self.vision_flops,
            "flops": self.flops,
            "kv_bytes": self.kv_bytes,
        }

    def _tokens_before(self, layer: int) -> int:
        """Tokens that a filter layer scores: all of them where vision tokens have just come in."""
        if layer == self.schedule.inject:
            return self.text_tokens + self.total_vision_tokens
        return self.tokens[layer - 1]


def plan(
    schedule: Schedule | str,
    model: Any = None,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    vision_tokens: int | None = None,
    text_tokens: int = DEFAULT_TEXT_TOKENS,
    images: int = 1,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    dtype_bytes: int | None = None,
    batch_size: int = 1,
    new_tokens: int = 0,
) -> Plan:
    """Resolve a schedule (or its text form) for a model, or for the sizes given.

    What is not given is read from `model`, a Hugging Face model or its config; keywords win over it.
    `vision_tokens` is the total over a sample's `images`, `text_tokens` the length of its text
    stream. Without a model, `num_layers`, `hidden_size`, `intermediate_size` and `vision_tokens` are
    needed, and the rest defaults to: heads of `head_dim` or else 128 (a single head where they do not
    divide the hidden size), as many key-value heads as heads, no output head, 2 bytes a number.
    """
    given = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "dtype_bytes": dtype_bytes,
    }
    sizes = {} if model is None else sizes_of(model)
    sizes |= {name: value for name, value in given.items() if value is not None}
    images = checked_int(images, "images", minimum=0)
    if vision_tokens is None and model is not None:
        per_image = vision_tokens_per_image(model)
        vision_tokens = None if per_image is None else per_image * images

    needed = {name: sizes.get(name) for name in ("num_layers", "hidden_size", "intermediate_size")}
    needed["vision_tokens"] = vision_tokens
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        source = "no model is given" if model is None else f"{type(model).__name__} does not tell"
        raise ScheduleError(
            f"plan() is missing {', '.join(missing)} ({source}): pass "
            f"{', '.join(name + '=...' for name in missing)}" + (" or a model" * (model is None))
        )
    geometry = Geometry(**with_defaults(sizes))

    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, geometry.num_layers)
    elif not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule={schedule!r} is a {type(schedule).__name__}: use a Schedule or its text form"
        )
    return _resolve(
        schedule,
        geometry,
        text_tokens=checked_int(text_tokens, "text_tokens", minimum=1),
        total_vision_tokens=checked_int(vision_tokens, "vision_tokens", minimum=0),
        images=images,
        batch_size=checked_int(batch_size, "batch_size", minimum=1),
        new_tokens=checked_int(new_tokens, "new_tokens", minimum=0),
    )


def _resolve(
    schedule: Schedule,
    geometry: Geometry,
    *,
    text_tokens: int,
    total_vision_tokens: int,
    images: int,
    batch_size: int,
    new_tokens: int,
) -> Plan:
    schedule.validate(geometry.num_layers)
    counts = schedule.keep_counts(total_vision_tokens, images)
    _warn_of_clamped_keeps(schedule, counts, total_vision_tokens, images)

    # Later events on one layer replace earlier ones: a prune at the layer of the inject is what it sees.
    events = {0: ("text", 0)} if schedule.inject else {0: ("start", total_vision_tokens)}
    if schedule.inject:
        events[schedule.inject] = ("inject", total_vision_tokens)
    for layer, count in counts.items():
        events[layer] = ("prune", count)
    if schedule.exit is not None and schedule.exit < geometry.num_layers:
        events[schedule.exit] = ("exit", 0)

    stops = [*list(events)[1:], geometry.num_layers]
    segments = tuple(
        Segment(start, stop, vision, reason)
        for (start, (reason, vision)), stop in zip(events.items(), stops, strict=True)
    )
    return Plan(
        schedule=schedule,
        geometry=geometry,
        text_tokens=text_tokens,
        total_vision_tokens=total_vision_tokens,
        images=images,
        batch_size=batch_size,
        new_tokens=new_tokens,
        segments=segments,
    )


def _warn_of_clamped_keeps(
    schedule: Schedule, counts: dict[int, int], vision_tokens: int, images: int
) -> None:
    """Tokens and fractions mixed in one schedule may turn out to grow; say where."""
    for layer, keep in schedule.prune.items():
        wanted = keep_count(keep, vision_tokens, images)
        if wanted > counts[layer]:
            logger.warning(
                "prune layer %d keeps %s, %d of %d vision tokens, but only %d are left there: it "
                "removes nothing",
                layer,
                keep,
                wanted,
                vision_tokens,
                counts[layer],
            )
