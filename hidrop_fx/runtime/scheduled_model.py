"""A model as its calls see it: which schedule it runs under, how its images are encoded, what it learned."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from hidrop_fx.capture.layers import base_of, text_decoder
from hidrop_fx.models import Family
from hidrop_fx.planning import Plan
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios

logger = logging.getLogger("hidrop_fx")


# Beside "text_config", names under which `get_text_config` of transformers looks for one.
_OTHER_TEXT = ("decoder", "generator", "text_encoder")


class OnceLogger:
    """Log lines that would otherwise come with every call, each of them once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str, level: int = logging.INFO) -> None:
        """Log a message unless it was logged before."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, message)


@dataclass(frozen=True, kw_only=True)
class ScheduledModel:
    """A model and the schedule that a call of it runs under."""

    model: Any
    plan: Plan
    family: Family
    ratios: Ratios | None = None
    """Pruning ratios in place of the schedule's counts."""
    dry_run: bool = False
    """Features are zeros of the right shape: a reducer keeps the first tokens of an image, as many as it would."""
    log_once: OnceLogger = field(default_factory=OnceLogger)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the plan."""
        return self.plan.schedule

    @property
    def base(self) -> Any:
        """The model without its head."""
        return base_of(self.model)

    @property
    def decoder(self) -> Any:
        """The text decoder."""
        return text_decoder(self.model)

    @cached_property
    def embedding(self) -> Any:
        """The token embedding of the text decoder, a module, looked up once a call."""
        return text_decoder(self.model).get_input_embeddings()

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of vision places, in the order of the family's modalities."""
        return self.family.tokens(self.model.config)

    def words(self, ids: Tensor) -> Tensor:
        """Return the ids that the embedding is asked for in the place of ids [B, T]."""
        return self.family.embedded_ids(self.model.config, ids)

    def has_images(self, inputs: dict[str, Any]) -> bool:
        """Return True if a call has pixels, or what a vision tower made of them."""
        return any(kind.given(inputs) for kind in self.family.modalities)

    @cached_property
    def _configs(self) -> tuple[Any, Any]:
        """Configuration of the model and of its text decoder, looked up once a call."""
        config = self.model.config
        live = object.__getattribute__(config, "__dict__")
        text = live.get("text_config")
        if text is None or any(name in live for name in _OTHER_TEXT):
            text = config.get_text_config()
        return config, text

    def requests(self, inputs: dict[str, Any], name: str) -> bool:
        """Return True if an optional output is asked for in a call, or else in the model's configuration."""
        wanted = inputs.get(name)
        if wanted is None:
            wanted = any(_configured(config, name) for config in self._configs)
        return bool(wanted)


def _configured(config: Any, name: str) -> Any:
    """Return a configuration's value, from its `__dict__` where it is there: each look-up by its class takes 10 us."""
    live = object.__getattribute__(config, "__dict__")
    if name in live:
        return live[name]
    behind = f"_{name}"  # where the property of that name has it
    return live[behind] if behind in live else getattr(config, name, False)
