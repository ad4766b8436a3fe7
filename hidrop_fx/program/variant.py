"""Programs of one model, told apart: by kind, and by variant."""

from dataclasses import dataclass
from typing import Literal

from hidrop_fx.ops.masks import MaskRule

Kind = Literal["prefill", "train", "decode"]
Output = Literal["all", "chosen"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The properties that tell one program from another of its kind."""

    output: Output = "all"
    """Rows that prefill and train return: all, or those at the input `output_columns`."""
    masks: tuple[tuple[str, MaskRule], ...] = ()
    """Captured masks that are not plain causal for the prompt at hand, by name, and their rules."""
    masked: bool = False
    """Decode takes a mask per segment."""
    states: bool = False
    """The hidden states between the layers are returned too."""
    placeholders: bool = False
    """The text stream holds vision places, to which the model's layers add features (deepstack)."""
    overlap: bool = False
    """The vision tower runs beside the layers before the injection."""
    behind: bool = False
    """A prompt with images behind what a cache holds: its tokens see that too."""
    differentiable: bool = False
    """Keys and values are returned with their gradients: those of the prompt by prefill, those that
    decode was given and made by decode, which writes to no buffer then. Train programs always are."""


def program_name(kind: Kind, variant: Variant) -> str:
    """Return the name of a program in dumps and reports: "prefill", "prefill-all", "decode-masked"."""
    usual: Output = "chosen" if kind == "prefill" else "all"
    parts: list[str] = [kind]
    if variant.output != usual:
        parts.append(variant.output)
    rules = [rule for _, rule in variant.masks]
    blocks, floors = any(r.blocks for r in rules), any(r.floors for r in rules)
    parts += ["blocks"] * blocks
    parts += ["windows"] * (not blocks and any(r.window is not None for r in rules))
    parts += ["chunks"] * any(r.chunk is not None for r in rules)
    parts += ["bottleneck"] * floors
    parts += ["masked"] * variant.masked
    parts += ["behind"] * variant.behind
    parts += ["placeholders"] * variant.placeholders
    parts += ["differentiable"] * variant.differentiable
    return "-".join(parts)
