"""Methods by name: which tokens are scored high, how many stay, how the survivors are numbered.

    register_scorer("mine")(my_scores)         # then score="mine" in any schedule

    registry        Deferred, Scorer, register_scorer, and the table that names are looked up in
    needs           the tensors that a score may read, and what each costs
    queries         which rows of a prompt score
    last_token, all_text               HiDrop's scorers
    ivc_prune, previous_layer, sparsevlm, state_change, random, pyramid_drop, twig, withdrawal
                    published methods, each with its scorer
    reducers        Reducer and register_reducer: fewer tokens of an image before the decoder
    before_decoder  published methods whose stage lies there
    index_preserving  a published method whose stage lies before the vision tower
    ppe             a published method whose merged tokens keep several position ids
    frozen_vision, voco
                    published methods that are no events: fields of a schedule alone
    cache_cuts      CacheCut and register_cache_cut: what a layer's cache keeps of a prompt
    cache           published methods that cut caches
    published       Method and register_method: schedules by a method's name and its own parameters
    selection       Selection and Rank: fixed counts, or learned ones
    merging         Merge: what dropped tokens leave in those that stay
    positions       PositionRule: how tokens are numbered for RoPE once some are missing

Schedules check names here; passes and the plain loop call the same score functions. A file here imports torch for type
checkers alone, so that planning loads no heavy package: a score function that needs more than the methods of tensors
stands in `ops` and is named by a `Deferred`.
"""

from hidrop_fx.methods import last_token  # noqa: F401 - they register themselves, in this order

# isort: split
from hidrop_fx.methods import (  # noqa: F401
    all_text,
    before_decoder,
    cache,
    frozen_vision,
    index_preserving,
    ivc_prune,
    ppe,
    previous_layer,
    pyramid_drop,
    random,
    sparsevlm,
    state_change,
    twig,
    voco,
    withdrawal,
)
from hidrop_fx.methods.cache_cuts import CACHE_CUTS, CacheCut, register_cache_cut
from hidrop_fx.methods.merging import MERGES, Merge
from hidrop_fx.methods.positions import POSITION_RULES, PositionRule
from hidrop_fx.methods.published import METHODS, Method, register_method
from hidrop_fx.methods.reducers import REDUCERS, Reducer, register_reducer
from hidrop_fx.methods.registry import SCORERS, Deferred, Scorer, register_scorer
from hidrop_fx.methods.selection import RANKS, SELECTIONS, Rank, Selection

__all__ = [
    "CACHE_CUTS",
    "MERGES",
    "METHODS",
    "POSITION_RULES",
    "RANKS",
    "REDUCERS",
    "SCORERS",
    "SELECTIONS",
    "CacheCut",
    "Deferred",
    "Merge",
    "Method",
    "PositionRule",
    "Rank",
    "Reducer",
    "Scorer",
    "Selection",
    "register_cache_cut",
    "register_method",
    "register_reducer",
    "register_scorer",
]
