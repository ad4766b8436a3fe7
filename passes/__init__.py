"""The passes: each rewrites a program in place, in its own file, under one signature.

    def some_pass(program: Program, plan: Plan, *, option=...) -> PassResult

A pass plans first and mutates second. It raises `PassError` where a requested rewrite has no place,
and returns how many places it rewrote. `hidrop_fx.pipeline.pipeline` says which run, in which order, and why.
"""

from hidrop_fx.passes.attention import attention
from hidrop_fx.passes.cut_cache import cut_cache
from hidrop_fx.passes.cut_unseen import cut_unseen
from hidrop_fx.passes.deepstack import deepstack, deepstack_text
from hidrop_fx.passes.exit import exit_vision
from hidrop_fx.passes.head import head
from hidrop_fx.passes.inject import inject
from hidrop_fx.passes.kv_cache import kv_cache
from hidrop_fx.passes.overlap_vision import overlap_vision
from hidrop_fx.passes.past import attention_over_past
from hidrop_fx.passes.place_layers import place_layers
from hidrop_fx.passes.positions import positions
from hidrop_fx.passes.prune import prune
from hidrop_fx.passes.read_frozen import read_frozen
from hidrop_fx.passes.split_streams import split_streams

__all__ = [
    "attention",
    "attention_over_past",
    "cut_cache",
    "cut_unseen",
    "deepstack",
    "deepstack_text",
    "exit_vision",
    "head",
    "inject",
    "kv_cache",
    "overlap_vision",
    "place_layers",
    "positions",
    "prune",
    "read_frozen",
    "split_streams",
]
