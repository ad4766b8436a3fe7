"""Replace the captured attention of every layer by one that runs.

    causal:  scaled_dot_product_attention(q, k, v, is_causal=True)       # no mask tensor
    masked:  scaled_dot_product_attention(q, k, v, mask[columns][:, columns])

Before:  %attention = hidrop.attention(%q, %k, %v, %mask, 0.088, 0.0, None)
After:   %causal_attention = causal_attention(%q, %k, %v, 0.088, 0.0)

Valid tokens come first, in prompt order, so plain causal attention never shows them an invalid one.
Masks that are not plain causal (sliding windows, bidirectional blocks) have a table in the program,
from which `split_streams` and its successors gathered one for each stream.
"""

from typing import Any

from torch import fx

from hidrop_fx.attention import causal_attention, masked_attention, plain_causal_attention
from hidrop_fx.planning import Plan
from hidrop_fx.program import PassResult, Program
from hidrop_fx.regions import Region


def attention(program: Program, plan: Plan, *, fused: bool = True) -> PassResult:
    """Args: fused: use the fused kernels; otherwise plain matrix products, to rule the kernels out."""
    causal = causal_attention if fused else plain_causal_attention
    masked = 0
    for region in program.regions:
        query, key, value, mask, scale, dropout, _ = region.attention.args
        read: tuple[Any, ...]
        if _reads_table(program, region):
            masked += 1
            read = (query, key, value, mask)
            new = program.call(masked_attention, *read, scale, dropout, before=region.attention)
        else:
            read = (query, key, value)
            new = program.call(causal, *read, scale, dropout, before=region.attention)
        replace_attention(region, new)
    return PassResult(matched=len(program.regions), note=f"{masked} layers with a mask")


def replace_attention(region: Region, new: fx.Node) -> None:
    """Put another node in the place of a region's attention."""
    old = region.attention
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    region.nodes.insert(region.nodes.index(old), new)
    region.attention = new


def _reads_table(program: Program, region: Region) -> bool:
    mask = region.attention.args[3]
    return any(region.sides.get(side) is mask for side in program.mask_tables)
