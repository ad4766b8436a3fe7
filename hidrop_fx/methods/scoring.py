"""What scores may depend on: the whole prompt, or nothing that stands behind an image.

    Schedule(prune={2: 0.5}, scoring="agnostic")     # kept for whatever is asked later

"prompt" leaves the rows that score to the scorer. "agnostic" has each image scored by its own last token that is still there,
which has seen the image and what stands before it, and nothing behind: another question keeps the same tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.queries import Prompt, all_text, last_prompt_token, last_round

if TYPE_CHECKING:
    from torch import Tensor

    from hidrop_fx.methods.registry import Scorer

PROMPT = "prompt"
AGNOSTIC = "agnostic"
SCORINGS: tuple[str, ...] = (PROMPT, AGNOSTIC)

_ATTENTION = frozenset(
    [
        *("query", "key", "scale", "columns", "query_columns"),
        *("previous_query", "previous_key", "previous_scale"),
    ]
)
_ROWS = frozenset(["query", "query_columns", "previous_query", "twig_query", "raters"])


def image_ends(prompt: Prompt) -> Tensor:
    """Select the last vision token of each image, or of several with no text between; a row's last token if it has none."""
    vision = prompt.valid & ~prompt.text
    behind = vision.new_zeros(vision.shape)
    behind[:, :-1] = vision[:, 1:]
    return prompt.columns(vision & ~behind)


def scored_without_question(scorer: Scorer) -> Scorer:
    """Return a scorer whose scores depend on nothing behind an image.

    Raises:
        ScheduleError: it scores by rows of its own choice.
    """
    if not _ROWS & set(scorer.parameters):  # it asks for no row
        return scorer
    if scorer.queries not in (last_prompt_token, last_round, all_text):
        raise ScheduleError(
            f"score={scorer.name!r} chooses the rows that score by itself, which scoring='agnostic' takes from it; use "
            "score='last_token', 'previous_layer' or 'state_change', or scoring='prompt'"
        )
    return replace(scorer, queries=image_ends)


def reads_attention(scorer: Scorer) -> bool:
    """Return True if a score is what query rows pay to each token, and no more."""
    asked = set(scorer.parameters)
    return asked <= _ATTENTION and bool(asked & {"key", "previous_key"}) and bool(asked & _ROWS)


def scores_alone(scorer: Scorer) -> bool:
    """Return True if a score asks for no row, so that tokens of a later turn are scored as if they were all there is."""
    return not _ROWS & set(scorer.parameters)
