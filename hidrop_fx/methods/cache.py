"""Methods that cut the caches behind a full prefill: SnapKV, PyramidKV, MixKV."""

from hidrop_fx.methods.cache_cuts import CACHE_CUTS, CacheCut
from hidrop_fx.methods.published import Fields, register_method

VARIANTS: tuple[str, ...] = ("attn", "mixkv", "headwisemixkv")
_POOLING: tuple[str, ...] = ("avg", "max")
_HEADS: tuple[str, ...] = ("mean", "max")
_READS = ("query", "key", "value", "seen", "past", "real", "scale", "softcap", "sinks")


def _checked(
    window: int, capacity: int, kernel: int, pooling: str, heads: str, variant: str
) -> None:
    for name, value in {"window": window, "capacity": capacity, "kernel": kernel}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a number of tokens; use an int >= 1")
    if window >= capacity:
        raise ValueError(
            f"window={window} leaves none of capacity={capacity} to choose; use a window below {capacity}, or a "
            f"capacity above {window}"
        )
    if kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} has no middle; use an odd number")
    choices = (
        ("pooling", pooling, _POOLING),
        ("heads", heads, _HEADS),
        ("variant", variant, VARIANTS),
    )
    for name, given, known in choices:
        if given not in known:
            raise ValueError(f"{name}={given!r}; use one of {', '.join(map(repr, known))}")


def _same(
    tokens: int,
    *,
    window: int,
    capacity: int,
    kernel: int,
    pooling: str,
    heads: str,
    variant: str = "attn",
) -> int:
    _checked(window, capacity, kernel, pooling, heads, variant)
    return capacity


def _pyramid(
    tokens: int,
    layer: int,
    layers: int,
    *,
    window: int,
    capacity: int,
    beta: int,
    kernel: int,
    pooling: str,
    heads: str,
    variant: str,
) -> int:
    """Let capacities fall linearly over the layers, their mean that of the window and the rest."""
    _checked(window, capacity, kernel, pooling, heads, variant)
    if isinstance(beta, bool) or not isinstance(beta, int) or beta < 1:
        raise ValueError(
            f"beta={beta!r} is not the last layer's part of a capacity; use an int >= 1"
        )
    mean = capacity - window
    last = mean // beta
    first = 2 * mean - last
    if first >= tokens - window:
        first = tokens - window
        last = 2 * mean - first
    step = (first - last) // (layers - 1) if layers > 1 else 0
    return first - layer * step + window


def _ship(name: str, function: str, keeps: object, /, **defaults: object) -> None:
    """Register a function of `hidrop_fx.ops.cache_scores`, which is imported when it is first run."""
    score = f"hidrop_fx.ops.cache_scores:{function}"
    rule = CacheCut(name=name, score=score, capacity=keeps, reads=_READS, defaults=defaults)  # type: ignore[arg-type]
    CACHE_CUTS.add(name, rule)


_POOLED = {"kernel": 5, "pooling": "avg", "heads": "mean"}
_ship("snapkv", "window_scores", _same, window=32, capacity=256, **_POOLED)
_ship(
    "pyramidkv",
    "window_scores",
    _pyramid,
    window=32,
    capacity=256,
    beta=20,
    **_POOLED,
    variant="attn",
)
_ship("mixkv", "window_scores", _same, window=32, capacity=256, **_POOLED, variant="headwisemixkv")


@register_method(
    "snapkv",
    source="SnapKV, NeurIPS 2024; as in github.com/xuyang-liu16/MixKV, which keeps columns by KV head",
    summary="on the cache: columns that the last `window` tokens attend to, pooled over their neighbours",
)
def snapkv(*, window: int = 32, capacity: int = 256, variant: str = "attn") -> Fields:
    """Keep so many tokens of each layer and KV head, the window among them; `variant` scores as MixKV's do."""
    if variant != "attn":
        return mixkv(window=window, capacity=capacity, variant=variant)
    return {"cache": f"snapkv(window={window!r},capacity={capacity!r})"}


@register_method(
    "pyramidkv",
    source="PyramidKV, arXiv 2406.02069; as in github.com/xuyang-liu16/MixKV",
    summary="on the cache: SnapKV's rule, with capacities that fall over the layers",
)
def pyramidkv(
    *, window: int = 32, capacity: int = 256, beta: int = 20, variant: str = "attn"
) -> Fields:
    """Keep so many tokens in the mean over layers; `variant` scores as MixKV's do."""
    return {
        "cache": f"pyramidkv(window={window!r},capacity={capacity!r},beta={beta!r},variant={variant!r})"
    }


@register_method(
    "mixkv",
    source="MixKV, ICLR 2026; github.com/xuyang-liu16/MixKV, with the redundancy of a head measured on the prompt",
    summary="on the cache: SnapKV's attention and norms of values, mixed with how far keys lie from their mean",
)
def mixkv(*, window: int = 32, capacity: int = 256, variant: str = "headwisemixkv") -> Fields:
    """Keep so many tokens of each layer and KV head; "mixkv" weighs the three scores alike, "attn" is SnapKV."""
    return {"cache": f"mixkv(window={window!r},capacity={capacity!r},variant={variant!r})"}
