"""Say in one line why a schedule has no effect on a batch that has images, once for each reason.

vision = valid & a placeholder & not needed          # empty, or left whole by every event
"""

import logging
from typing import Any

from torch import Tensor

from hidrop_fx.planning.batch_layout import IGNORE, Layout
from hidrop_fx.runtime.prompt import Prompt
from hidrop_fx.runtime.scheduled_model import ScheduledModel

_EMBEDS = (
    "inputs_embeds without a placeholder token's embedding: every token counts as text, and the "
    "schedule finds no vision token. Leave the image's places as the placeholder's embedding, "
    "and pass pixel_values or mm_encoder_outputs"
)
_EMPTY = (
    "the images of this batch have no features, and the prompt no placeholder: the schedule finds no "
    "vision token. Look at what encoded them"
)
_MASKED = (
    "attention_mask hides every image place of this batch: the schedule finds no vision token. The mask "
    "is 1 for all real tokens, placeholders included"
)
_SUPERVISED = (
    f"labels supervise what every image place predicts, so that all of them count as text and the schedule "
    f"finds no vision token. Set labels to {IGNORE} on image places (and on the prompt)"
)
_LAST = (
    "the prompt ends with its image, of one token, whose output is needed: the schedule finds no vision "
    "token. Put the text behind the image, as the processor's chat template does"
)
_WORDS = (
    "image placeholder tokens behind a prompt's cache are words, as for Hugging Face where no images come "
    "with them: the schedule does not see them. Pass the full conversation with its images and "
    "past_key_values=None"
)


def note_idle_schedule(
    scheduled: ScheduledModel, prompt: Prompt, layout: Layout, inputs: dict[str, Any]
) -> None:
    """Log why a schedule changes nothing for a prompt, where it has images or may have them."""
    if scheduled.schedule.whole_prefill:
        return
    reason = _reason(scheduled, prompt, layout, inputs)
    if reason is not None:
        scheduled.log_once(reason, logging.WARNING)


def note_words_for_images(scheduled: ScheduledModel, ids: Tensor) -> None:
    """Log that placeholders among the tokens [B, q] behind a cache stand for no image."""
    if ids.shape[1] == 1 or scheduled.schedule.identity:  # not a wait for the device at every token
        return
    if any(bool((ids == token).any()) for token in scheduled.tokens):
        scheduled.log_once(_WORDS, logging.WARNING)


def _reason(
    scheduled: ScheduledModel, prompt: Prompt, layout: Layout, inputs: dict[str, Any]
) -> str | None:
    counts, plan = layout.vision_counts, layout.plan
    first, *others = (counts[event.name] for event in plan.events)
    if any(first):
        schedule = plan.schedule
        # A bottleneck tells of rows without its tokens by itself.
        moves = schedule.inject > 0 or schedule.position_rule.renumbers_text or schedule.before
        hides = schedule.reads is not None or schedule.bottleneck is not None
        if moves or hides or any(left != first for left in others):
            return None
        return _unchanged(layout)
    if not scheduled.has_images(inputs):
        return _EMBEDS if prompt.ids is None else None
    places = prompt.placeholder & prompt.valid
    if not bool(places.any()):
        if any(layout.removed):  # the stage before the decoder says so
            return None
        return _MASKED if bool(prompt.placeholder.any()) else _EMPTY
    labels = prompt.labels
    if labels is not None and bool((places[:, :-1] & (labels[:, 1:] != IGNORE)).any()):
        return _SUPERVISED
    return _LAST


def _unchanged(layout: Layout) -> str:
    """Say why events leave every vision token where it is."""
    plan = layout.plan
    if not plan.of_kind("prune"):
        return (
            f"the schedule {plan.schedule} does nothing in {plan.num_layers} layers: vision tokens are there "
            "from the first to the last. Let them enter later, be pruned, or leave earlier"
        )
    kept = "learned ratios keep" if plan.schedule.learns else f"the schedule {plan.schedule} keeps"
    return (
        f"{kept} every vision token of this batch: nothing is pruned. A count is tokens per image, a "
        "fraction is of all; ask for fewer than the images have"
    )
