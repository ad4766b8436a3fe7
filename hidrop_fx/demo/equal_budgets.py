"""Published methods as schedules of equal cost for the shipped model: 12 layers, 144 vision tokens a picture.

    SCHEDULES["fastv", "11"]     # "fastv(layer=1,keep=4)": 15.7 vision tokens a layer on average

Layers are the authors' own, scaled from 32 to 12 and at least 1; tokens are kept in about the authors'
proportions, as many as the budget pays for.
"""

BUDGETS = ("11", "8")
"""Per cent of 144 vision tokens that a layer runs on, on average: 16 and 12."""
KV_BUDGETS = ("11 kv", "8 kv")
"""Per cent of 144 vision tokens that the KV cache keeps a layer, for methods whose prefill saves nothing or little."""
OWN = "own"
"""Of a method that has no such number."""

_HIDROP = {
    "11": "inject=3,prune=4:42+5:3+6:1,exit=9",
    "8": "inject=3,prune=3:100+4:38+5:3+6:1,exit=9",
}
_TEXTS = {
    # The paper's layers scaled; its keeps of 10, 5 and 1, too, and the first prune is what makes up the budget.
    "hidrop": (_HIDROP["11"], _HIDROP["8"]),
    "hidrop, merged": tuple(f"{text},merge=nearest_key" for text in _HIDROP.values()),
    "hidrop, random": tuple(f"{text},score=random" for text in _HIDROP.values()),
    # Square grids: 4 x 4, and 3 x 3.
    "pooling": ("pooling(keep=16)", "pooling(keep=9)"),
    "divprune": ("divprune(ratio=.112)", "divprune(ratio=.084)"),
    "cdpruner": ("cdpruner(keep=16)", "cdpruner(keep=12)"),
    # Not as published: what is left keeps its places, where the authors number it anew.
    "pooling, in place": ("before=pooling(tokens=16)", "before=pooling(tokens=9)"),
    "divprune, in place": ("before=divprune(ratio=.112)", "before=divprune(ratio=.084)"),
    "cdpruner, in place": ("before=cdpruner(tokens=16)", "before=cdpruner(tokens=12)"),
    "visionzip": ("visionzip(dominant=13,contextual=3)", "visionzip(dominant=10,contextual=2)"),
    "duet": (
        "duet(dominant=23,contextual=3,layer=6,keep=12,exit=9)",
        "duet(dominant=18,contextual=2,layer=6,keep=8,exit=9)",
    ),
    # One full layer costs 12 tokens of the average already, so that 8 % is exceeded even by a single token.
    "fastv": ("fastv(layer=1,keep=4)", "fastv(layer=1,keep=1)"),
    "v2drop": (
        "v2drop(layers=(1,6,8),keeps=(7,3,1))",
        "v2drop(layers=(1,6,8),keeps=(1,1,1))",
    ),
    "sparsevlm": (
        "sparsevlm(layers=(1,3,6),keeps=(7,3,1))",
        "sparsevlm(layers=(1,3,6),keeps=(1,1,1))",
    ),
    "random": ("random(layers=(1,),keeps=(4,))", "random(layers=(1,),keeps=(1,))"),
    # A full first stage, as in the paper, would cost 36 tokens a layer, so the first of four prunes is at layer 0.
    "pyramiddrop": (
        "pyramiddrop(layers=(0,3,6,9),keeps=(34,17,9,4))",
        "pyramiddrop(layers=(0,3,6,9),keeps=(26,13,6,3))",
    ),
    # It has no other place: one layer is 12 tokens, two are 24.
    "vtw": ("vtw(layer=1)", "vtw(layer=1)"),
}
# Columns of the cache a KV head, of which 11 to 15 are text and the last 8 the window.
_KV_TEXTS = {
    "snapkv": ("snapkv(window=8,capacity=29)", "snapkv(window=8,capacity=25)"),
    "pyramidkv": ("pyramidkv(window=8,capacity=24)", "pyramidkv(window=8,capacity=25)"),
    "mixkv": ("mixkv(window=8,capacity=29)", "mixkv(window=8,capacity=25)"),
    # The authors' layer scaled and 4 tokens, 1 token, where theirs leaves up to 31 %.
    "ivc-prune": tuple(
        f"prune=6:{keep},cache=retroactive(layer=6,first=1),score=value_similarity"
        for keep in (4, 1)
    ),
}

SCHEDULES: dict[tuple[str, str], str] = {
    **{
        (name, budget): text
        for name, texts in _TEXTS.items()
        for budget, text in zip(BUDGETS, texts, strict=True)
    },
    **{
        (name, budget): text
        for name, texts in _KV_TEXTS.items()
        for budget, text in zip(KV_BUDGETS, texts, strict=True)
    },
    ("pooling, in place", OWN): "before=pooling(tokens=36)",
    ("ivc-prune", OWN): "ivc-prune(layer=6)",
    ("vica", OWN): "vica(layers=(0,3,4,5))",
}
"""(method, budget) -> schedule."""
