"""Arguments of `generate` from what an evaluator's task says.

task = {"until": ["ASSISTANT:"], "max_new_tokens": 16, "temperature": 0}
settings = Generation.of_task(task)
model.generate(**inputs, **settings.arguments)
text = settings.cut(text)
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import GenerationConfig

from hidrop_fx.errors import InputError

logger = logging.getLogger("hidrop_fx")

NEW_TOKENS = 1024
"""Of an answer, at most, where a task does not say it: as in lmms-eval's LLaVA."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# Said by some tasks to models with a way of their own to cut images, or to the loop around the model.
_NOT_OURS = ("image_aspect_ratio", "max_agentic_steps")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are generated."""

    arguments: Mapping[str, Any]
    """For `generate`."""
    until: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""

    @classmethod
    def of_task(cls, task: Mapping[str, Any]) -> "Generation":
        """Read the generation arguments of a task; greedy at temperature 0, and where nothing is said.

        What transformers does not know is left out, with a warning.

        Raises:
            InputError: `until` is no text and no list of texts.
        """
        given = {name: value for name, value in task.items() if name not in _NOT_OURS}
        until = _texts(given.pop("until", None))
        sampled = bool(given.pop("do_sample", (given.get("temperature") or 0) > 0))
        if not sampled:
            given = {name: value for name, value in given.items() if name not in _SAMPLING}
        for name in [name for name in given if not hasattr(_defaults(), name)]:
            del given[name]
            _warn(name)
        given.setdefault("max_new_tokens", NEW_TOKENS)
        return cls(arguments={**given, "do_sample": sampled}, until=until)

    def cut(self, text: str) -> str:
        """Return an answer up to the first text that ends it, without spaces around it."""
        for end in self.until:
            text = text.split(end, 1)[0]
        return text.strip()


def _texts(until: Any) -> tuple[str, ...]:
    found = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise InputError(f"until={until!r}: write a text that ends an answer, or a list of some")
    return tuple(text for text in found if text)


@lru_cache
def _defaults() -> GenerationConfig:
    return GenerationConfig()


@lru_cache
def _warn(name: str) -> None:
    logger.warning("%r of a task is no argument of transformers' generate; it is ignored", name)
