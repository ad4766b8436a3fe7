"""Position rules: the numbering of tokens for RoPE once vision tokens are missing."""

from dataclasses import dataclass

from hidrop_fx.methods.registry import Registry


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """Position ids of the tokens that layers see."""

    name: str
    renumbers_after_prunes: bool = False
    """Survivors of a prune or exit are numbered 0, 1, 2, ...; each layer decodes on from its own last."""
    renumbers_text: bool = False
    """Text is numbered as if no vision token stood before it."""
    closes_gaps: bool = False
    """Of an image that a stage before the decoder has taken tokens out of, the others keep their ids, and what follows
    begins behind the largest of those."""


POSITION_RULES: Registry[PositionRule] = Registry("positions", default="persistent")
POSITION_RULES.add("persistent", PositionRule(name="persistent"))
POSITION_RULES.add("compact", PositionRule(name="compact", renumbers_after_prunes=True))
POSITION_RULES.add("gapless", PositionRule(name="gapless", closes_gaps=True))
POSITION_RULES.add("group", PositionRule(name="group", renumbers_text=True))
