"""Methods whose stage lies before the decoder: DivPrune, CDPruner, VisionZip, DUET-VLM, and pooling, their baseline."""

import math
from collections.abc import Callable

from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.reducers import REDUCERS, Reducer


def _share(tokens: int, *, ratio: float) -> int:
    if isinstance(ratio, bool) or not isinstance(ratio, float | int) or not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio!r} is not a share of the tokens; use a float in (0, 1]")
    return round(tokens * ratio)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a number of tokens; use an int >= 1")


def _at_most(kept: int, *, tokens: int, relevance: float) -> int:
    _positive(tokens=tokens)
    number = isinstance(relevance, float | int) and not isinstance(relevance, bool)
    if not number or not 0 <= relevance < 1:
        raise ValueError(f"relevance={relevance!r} is not a weight; use a float in [0, 1)")
    return min(kept, tokens)


def _square(count: int, *, tokens: int) -> int:
    _positive(tokens=tokens)
    if math.isqrt(count) ** 2 != count:
        raise ValueError(f"an image of {count} tokens is no square grid, which pooling needs")
    return min(math.isqrt(count), math.isqrt(tokens)) ** 2


def _both(count: int, *, dominant: int, contextual: int) -> int:
    _positive(dominant=dominant)
    if isinstance(contextual, bool) or not isinstance(contextual, int) or contextual < 0:
        raise ValueError(f"contextual={contextual!r} is not a number of tokens; use an int >= 0")
    if dominant + contextual > count:
        raise ValueError(
            f"dominant={dominant} and contextual={contextual} are more than the {count} tokens of an image"
        )
    return dominant + contextual


def _ship(
    name: str,
    function: str,
    keep: Callable[..., int],
    counts: tuple[str, ...],
    *needs: str,
    moves: bool = False,
    **defaults: object,
) -> None:
    """Register a function of `hidrop_fx.ops.reduction`, which is imported when it is first run."""
    path = f"hidrop_fx.ops.reduction:{function}"
    REDUCERS.add(
        name,
        Reducer(
            name=name,
            reduce=path,
            keep=keep,
            needs=needs,
            defaults=defaults,
            counts=counts,
            moves=moves,
        ),
    )


_ship("divprune", "max_min_diversity", _share, ("ratio",), ratio=0.098)
_ship("cdpruner", "conditional_diversity", _at_most, ("tokens",), "text", tokens=64, relevance=0.5)
_ship("pooling", "pooled_grid", _square, ("tokens",), tokens=144)
_ship(
    "visionzip",
    "merged_by_tower",
    _both,
    ("dominant", "contextual"),
    "tower",
    moves=True,
    dominant=54,
    contextual=10,
)


def _before(text: str, **more: object) -> Fields:
    return {"before": text, "positions": "compact", **more}


@register_method(
    "divprune",
    source="DivPrune, CVPR 2025; github.com/vbdi/divprune",
    summary="before the decoder: tokens that are farthest from those chosen before, by cosine distance",
)
def divprune(*, ratio: float = 0.098) -> Fields:
    """Keep a share of each image's tokens, rounded as Python rounds."""
    return _before(f"divprune(ratio={ratio!r})")


@register_method(
    "cdpruner",
    source="CDPruner, NeurIPS 2025, arXiv 2506.10967; OpenVINO GenAI, whose relevance is to the text embeddings",
    summary="before the decoder: greedy MAP of a determinantal point process, conditioned on the text",
)
def cdpruner(*, keep: int = 64, relevance: float = 0.5) -> Fields:
    """Keep so many tokens of each image; `relevance` 0 looks at diversity alone."""
    return _before(f"cdpruner(tokens={keep!r},relevance={relevance!r})")


@register_method(
    "pooling",
    source="a baseline",
    summary="before the decoder: the grid of an image's tokens is averaged to a smaller one",
)
def pooling(*, keep: int = 144) -> Fields:
    """Average to the largest square grid of at most so many tokens."""
    return _before(f"pooling(tokens={keep!r})")


@register_method(
    "visionzip",
    source="VisionZip, CVPR 2025; github.com/JIA-Lab-research/VisionZip",
    summary="before the decoder: what the tower's class token attends to; the rest is merged by its keys",
)
def visionzip(*, dominant: int = 54, contextual: int = 10) -> Fields:
    """Keep the class token and `dominant - 1` patches, and `contextual` merged ones."""
    return _before(f"visionzip(dominant={dominant!r},contextual={contextual!r})")


@register_method(
    "duet",
    source="DUET-VLM, arXiv 2602.18846; the counts are a choice of ours",
    summary="VisionZip's merge before the decoder, then one prune by the last prompt token, then an exit",
    trains=True,
)
def duet(
    *,
    dominant: int = 170,
    contextual: int = 22,
    layer: int = 16,
    keep: int = 64,
    exit: int | None = 24,
) -> Fields:
    """Merge before the decoder, keep so many tokens from `layer` on, none from `exit` on."""
    text = f"visionzip(dominant={dominant!r},contextual={contextual!r})"
    return _before(text, prune=pairs([layer], [keep]), exit=exit)
