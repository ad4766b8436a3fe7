"""The eager meaning of each event kind, for one row, in plain tensor code.

    EAGER_EVENTS["prune"](run, event, layer)     # run: a `RunningRow` at the input of `layer`

A kind that is registered in `planning/event_kinds.py` has its function here, under the same name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.methods import SCORERS, Scorer
from hidrop_fx.ops import tokens
from hidrop_fx.planning import Event
from hidrop_fx.reference.rows import RunningRow


def inject(run: RunningRow, event: Event, layer: nn.Module) -> None:
    """Merge the vision tokens in at their columns."""
    run.columns, order = torch.cat([run.columns, run.row.vision]).sort()
    run.hidden = torch.cat([run.hidden, run.row.vision_embeds])[order]


def prune(run: RunningRow, event: Event, layer: nn.Module) -> None:
    """Keep the vision tokens with the highest scores, the lower column winning a tie."""
    assert event.scorer is not None
    scorer = SCORERS[event.scorer]
    with torch.no_grad():
        before = _attention_reads(run, scorer, prefix="previous_")  # the next line runs over it
        if "twig" in scorer.modules:
            run.run_branch(run.modules["twig"], event.layer)
            before |= _attention_reads(run, scorer, prefix="twig_")
        run.run(layer, event.layer)
        given = before | _attention_reads(run, scorer)
        scores = _scores(scorer, run, event.layer, given)
    candidates = run.is_vision.nonzero().flatten()
    run.states.scores[event.layer] = run.columns[candidates], scores[candidates]
    keep = min(run.row.keep[event.layer], len(candidates))
    order = scores[candidates].argsort(descending=True, stable=True)
    stays = ~run.is_vision
    best = candidates[order[:keep]]
    stays[best] = scorer.most is None or ~scores[best].isneginf()
    joining = run.row.joining.get(event.layer)
    if joining is not None:
        pool, columns = joining
        places = candidates[order[keep : keep + pool]]
        added = _recycled(run.hidden[places], len(columns)) if len(columns) else run.hidden[:0]
        run.keep(stays)
        run.join(columns, added)
        return
    if event.option("merge") is not None:
        run.hidden = _merged(run, stays)
    run.keep(stays)


def _recycled(states: Tensor, count: int) -> Tensor:
    """Return the means [count, D] of the clusters of states [n, D], by density peaks."""
    flat = states.detach().float()
    apart = (flat[:, None] - flat[None]).norm(dim=2) / flat.shape[1] ** 0.5
    density = (-apart.sort(dim=1).values[:, :count].square().mean(dim=1)).exp()
    denser = density[None] > density[:, None]
    peak = torch.where(denser, apart, apart.max()).amin(dim=1) * density
    centres = peak.argsort(descending=True, stable=True)[:count]
    own = apart[centres].argmin(dim=0)
    own[centres] = torch.arange(count, device=own.device)
    sums = states.new_zeros(count, states.shape[1]).float().index_add(0, own, states.float())
    sizes = torch.bincount(own, minlength=count)[:, None]
    return (sums / (sizes + 1e-6)).to(states.dtype)


def _merged(run: RunningRow, stays: Tensor) -> Tensor:
    """Return the states [n, D] with those of the dropped tokens averaged into the nearest that stay, by their keys."""
    taking = (stays & run.is_vision).nonzero().flatten()
    dropped = (~stays).nonzero().flatten()
    if not len(taking) or not len(dropped):
        return run.hidden
    keys = run.attention.key[0].detach().float().transpose(0, 1).flatten(1)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    nearest = taking[(unit[dropped] @ unit[taking].T).argmax(dim=1)]
    sums = run.hidden.float().index_add(0, nearest, run.hidden[dropped].float())
    size = torch.ones_like(run.columns).index_add(0, nearest, torch.ones_like(nearest))
    return (sums / size[:, None]).to(run.hidden.dtype)


def leave(run: RunningRow, event: Event, layer: nn.Module) -> None:
    """Drop all vision tokens."""
    run.keep(~run.is_vision)


EAGER_EVENTS: dict[str, Callable[[RunningRow, Event, nn.Module], None]] = {
    "inject": inject,
    "prune": prune,
    "exit": leave,
}


def _scores(scorer: Scorer, run: RunningRow, layer: int, given: dict[str, Any]) -> Tensor:
    """Score the row's tokens [n], once the filter layer ran on all of them."""
    given = given | {
        "columns": run.columns[None],
        "is_vision": run.is_vision[None],
        "is_real": run.in_prompt[None],
        "query_columns": _query_columns(run)[None],
        "hidden": run.hidden[None],
        "previous_hidden": run.before[None],
    }
    if {"cos", "sin"} & set(scorer.parameters):
        rotation = run.rotation(layer)
        assert rotation is not None  # a score that reads it is refused at a convolution
        given["cos"], given["sin"] = rotation
    if {"previous_cos", "previous_sin"} & set(scorer.parameters):
        rotation = run.rotation(layer - 1)
        assert rotation is not None
        given["previous_cos"], given["previous_sin"] = rotation
    if "raters" in scorer.needs:
        given["raters"] = _raters(run)
    added = {n: given[n] for n in scorer.optional if given.get(n) is not None} | scorer.keywords
    return scorer.function(*(given[name] for name in scorer.parameters), **added)[0]


def _raters(run: RunningRow) -> Tensor:
    """Return the share [1, q] of each query row in a score, by its embedding and those of the vision tokens."""
    row, queries = run.row, _query_columns(run)
    text = row.text_embeds[torch.searchsorted(row.text, queries)].float()
    near = (row.vision_embeds.float() @ text.T).softmax(dim=1).mean(dim=0)
    raters = near > near.mean() if len(row.vision) else torch.zeros_like(queries, dtype=torch.bool)
    raters = (raters if raters.any() else torch.ones_like(raters)).float()
    return raters[None] / raters.sum()


def _attention_reads(run: RunningRow, scorer: Scorer, prefix: str = "") -> dict[str, Any]:
    """Return what the attention of the layer that ran last has read, under names that begin with a prefix."""
    if prefix and not any(name.startswith(prefix) for name in scorer.needs - {"previous_hidden"}):
        return {}
    attention = run.attention
    if not attention.attended:  # no score asks for what is not there
        return {}
    places = torch.searchsorted(run.columns, _query_columns(run))[None]
    found = {
        "scale": attention.scale,
        "softcap": attention.softcap,
        "sinks": attention.sinks,
        "query": tokens.take_keys(attention.query, places),
        "key": attention.key,
        "value": attention.value,
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def _query_columns(run: RunningRow) -> Tensor:
    queries = run.row.queries[run.row.queries >= 0]
    if not run.by_images:
        return queries
    there = run.columns[run.is_vision]
    last = [there[there <= column][-1:] for column in queries.tolist()]
    return torch.stack(
        [found[0] if len(found) else q for found, q in zip(last, queries, strict=True)]
    )
