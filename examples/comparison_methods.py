"""Methods that are compared for the demo model, and what their schedules cost: those of `hidrop eval`.

costs(SCHEDULES["fastv", "11"]).average_vision_tokens     # 15.7
"""

import hidrop_fx as hidrop
from hidrop_fx.demo.equal_budgets import BUDGETS, KV_BUDGETS, OWN, SCHEDULES

__all__ = ["BUDGETS", "CANDIDATES", "KV_BUDGETS", "OWN", "SCHEDULES", "cached_tokens", "costs"]

LAYERS, VISION_TOKENS, TEXT_TOKENS = 12, 144, 13
GEOMETRY = {
    "num_layers": LAYERS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CANDIDATES = (
    "hidrop", "pooling+hidrop", "divprune+hidrop", "cdpruner+hidrop", "pooling", "divprune", "cdpruner",
    "before=pooling(tokens=16)", "before=divprune(ratio=.1)", "before=cdpruner(tokens=16)",
    "before=pooling(tokens=25),prune=6:7", "before=divprune(ratio=.16),prune=6:8", "before=cdpruner(tokens=24),prune=6:8",
    "before=pooling(tokens=20),exit=9", "before=divprune(ratio=.14),exit=9", "before=cdpruner(tokens=20),exit=9",
    "fastv(layer=1)", "v2drop(layers=(1,6,8),keeps=(.5,.25,.1))", "sparsevlm(layers=(1,3,6),keeps=(76,28,9))",
    "pyramiddrop(layers=(0,3,6,9),keeps=(.5,.25,.125,.0625))", "vtw(layer=6)", "random(layers=(1,),keeps=(.5,))",
)  # fmt: skip
"""What calibration chooses from; it cannot try what reads the vision tower."""


def costs(schedule: hidrop.Schedule | str) -> hidrop.Costs:
    """Plan a schedule for one picture and a question."""
    return hidrop.plan(schedule, vision_tokens=VISION_TOKENS, text_tokens=TEXT_TOKENS, **GEOMETRY)


def cached_tokens(planned: hidrop.Costs) -> float:
    """Return the vision tokens of a prompt that a layer's cache holds on average."""
    return sum(planned.cached_tokens) / LAYERS - TEXT_TOKENS
