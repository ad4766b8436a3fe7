"""lmms-eval's model `hidrop`: answers under a schedule, in batches, with what each cost.

lmms-eval --model hidrop --model_args pretrained=DIR,schedule=hidrop-64,batch_size=8 --tasks gqa

Errors are raised: no sample is scored by an empty answer. Needs lmms-eval 0.7.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from hidrop_fx.errors import HidropError
from hidrop_fx.evaluation.answering import AnsweredBatch, answered
from hidrop_fx.evaluation.conversations import Conversation, text_part, turn
from hidrop_fx.evaluation.generation import Generation
from hidrop_fx.evaluation.likelihood import answer_losses
from hidrop_fx.evaluation.lmms_arguments import read_model_args
from hidrop_fx.evaluation.lmms_counts import (
    ExecutedTokenCounts,
    counts_of,
    log_throughput,
    total_of,
)
from hidrop_fx.evaluation.lmms_device import device_of_process
from hidrop_fx.evaluation.lmms_messages import conversation_of, shown_and_asked
from hidrop_fx.evaluation.loading import load_scheduled
from hidrop_fx.runtime.hf.binding import runtime_of


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question that waits for its batch."""

    text: str
    """As the task wrote it: longer ones go first."""
    conversation: Callable[[], Conversation]
    """Loads what is shown."""
    task: Mapping[str, Any]
    """The task's arguments of generation."""


@dataclass
class _Rounds:
    """One sample over its rounds."""

    texts: list[str] = field(default_factory=list)
    counts: list[ExecutedTokenCounts] = field(default_factory=list)
    info: Any = None
    """What the task hands itself from round to round."""


class _Hidrop(lmms):  # type: ignore[misc, unused-ignore]
    """What both classes share; they differ in how a task's request is read."""

    def __init__(
        self,
        pretrained: str | None = None,
        schedule: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        backend: str = "inductor",
        dtype: str = "auto",
        device: str | None = None,
        attention: str | None = None,
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Load the model and compile it; the arguments are those of --model_args.

        Args:
            pretrained, schedule, backend, dtype, device, attention, attn_implementation: see
                `hidrop_fx.evaluation.loading.load_scheduled`.
            batch_size: rows of a call of `generate`.
            max_batch_size: lmms-eval's, not used.
            system_prompt: a text, or a file of one, in front of each conversation.
            num_frames: frames that are read of a video; None for what the processor does.
        """
        super().__init__()
        self._batch_size = _positive("batch_size", batch_size)
        self._num_frames = None if num_frames is None else _positive("num_frames", num_frames)
        self._system = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self._loaded = load_scheduled(
            pretrained,
            schedule,
            backend=backend,
            dtype=dtype,
            device=device_of_process(device),
            attention=attention,
            attn_implementation=attn_implementation,
        )
        self._device = self._loaded.model.device
        self._warm = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Make the model from --model_args, which win over lmms-eval's --batch_size and --device.

        Raises:
            HidropError: an argument is unknown, or none.
        """
        more = {
            name: value for name, value in (additional_config or {}).items() if value is not None
        }
        return cls(**{**more, **read_model_args(arg_string, cls.__init__)})

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """Its processor's tokenizer."""
        return self._loaded.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Rows of a call of `generate`."""
        return self._batch_size

    def clean(self) -> None:
        """Give the model's memory back, as lmms-eval asks when all is answered."""
        del self._loaded
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests; what a sample cost is in its `token_counts`."""
        found = self._answers([self._asked(one) for one in requests], "Model Responding")
        return [GenerationResult(text=text, token_counts=counts) for text, counts in found]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests round after round, all samples of a round in batches; a result's text is the list of its rounds'."""
        samples = [_Rounds() for _ in requests]
        waiting = {i: self._asked(one) for i, one in enumerate(requests)}
        number = 0
        while waiting:
            number += 1
            found = self._answers([*waiting.values()], f"Round {number}")
            answers = dict(zip(waiting, found, strict=True))
            waiting = {}
            for i, (text, counts) in answers.items():
                samples[i].texts.append(text)
                samples[i].counts.append(counts)
                following = self._following(requests[i], samples[i], number)
                if following is not None:
                    waiting[i] = following
        return [
            GenerationResult(text=one.texts, token_counts=total_of(one.counts)) for one in samples
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return for each answer its loss, on average over its tokens, and whether it is the greedy one.

        The loss and not its negative: lmms-eval's own classes return that, and its metrics take the smallest.
        """
        asked: list[tuple[str, Callable[[], tuple[Conversation, str]]]] = []
        for one in requests:
            context, target, visuals, doc_id, task, split = one.args

            def loaded(
                context: str = context,
                target: Any = target,
                visuals: Any = visuals,
                place: tuple[Any, ...] = (task, split, doc_id),
            ) -> tuple[Conversation, str]:
                document = self._document(*place)
                answer = target if isinstance(target, str) else target(document)
                return self._with_system(shown_and_asked(visuals(document), context)), answer

            asked.append((context, loaded))
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        losses: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            given = [asked[i][1]() for i in batch]
            with self._loaded.in_use():
                found = answer_losses(
                    self.model, self._loaded.processor, given, num_frames=self._num_frames
                )
            losses |= {i: (one.loss, one.greedy) for i, one in zip(batch, found, strict=True)}
        return [losses[i] for i in range(len(asked))]

    def _asked(self, request: Instance) -> Asked:
        """Read a request to generate."""
        raise NotImplementedError

    def _following(self, request: Instance, sample: _Rounds, number: int) -> Asked | None:
        """Ask the task for the round of that number; None at the end. What it says of the rounds before is noted."""
        raise NotImplementedError

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _with_system(self, conversation: Conversation) -> Conversation:
        if self._system is None or conversation[0]["role"] == "system":
            return conversation
        return [turn("system", text_part(self._system)), *conversation]

    def _answers(self, asked: Sequence[Asked], title: str) -> list[tuple[str, ExecutedTokenCounts]]:
        """Answer questions in batches of one kind of generation, longer ones first; return answers in their order."""
        found: dict[int, tuple[str, ExecutedTokenCounts]] = {}
        batches: list[AnsweredBatch] = []
        with tqdm(total=len(asked), disable=self.rank != 0, desc=title) as bar:
            for places in _in_batches(asked, self._batch_size):
                done = self._answer([asked[i] for i in places])
                batches.append(done)
                for i, answer in zip(places, done.answers, strict=True):
                    found[i] = answer.text, counts_of(answer, done)
                bar.update(len(places))
        if batches:
            log_throughput(batches)
        return [found[i] for i in range(len(asked))]

    def _answer(self, batch: Sequence[Asked]) -> AnsweredBatch:
        conversations = [self._with_system(one.conversation()) for one in batch]
        compiled = runtime_of(self.model) is not None
        with self._loaded.in_use():
            done = answered(
                self.model,
                self._loaded.processor,
                conversations,
                Generation.of_task(batch[0].task),
                num_frames=self._num_frames,
                warm_up=compiled and not self._warm,
            )
        self._warm = True
        return done


class HidropChat(_Hidrop):
    """The model that is asked by messages, which lmms-eval prefers."""

    is_simple = False

    def _asked(self, request: Instance) -> Asked:
        context, messages, generation, doc_id, task, split = request.args

        def conversation() -> Conversation:
            return conversation_of(messages(self._document(task, split, doc_id)))

        return Asked(text=str(context), conversation=conversation, task=generation)

    def _following(self, request: Instance, sample: _Rounds, number: int) -> Asked | None:
        context, messages, generation, doc_id, task, split = request.args
        said = messages(
            self._document(task, split, doc_id),
            round_idx=number,
            previous_output=[*sample.texts],
            previous_round_info=sample.info,
        )
        if not (isinstance(said, tuple) and len(said) == 4):
            return None
        following, ended, texts, sample.info = said
        _take(sample, texts)
        if ended:
            return None
        conversation = conversation_of(following)
        return Asked(text=str(context), conversation=lambda: conversation, task=generation)


class HidropSimple(_Hidrop):
    """The model that is asked by a text and what is shown, with lmms-eval's --force_simple."""

    is_simple = True

    def _asked(self, request: Instance) -> Asked:
        context, generation, visuals, *_to_text, doc_id, task, split = request.args

        def conversation() -> Conversation:
            return shown_and_asked(visuals(self._document(task, split, doc_id)), context)

        return Asked(text=context, conversation=conversation, task=generation)

    def _following(self, request: Instance, sample: _Rounds, number: int) -> Asked | None:
        _, generation, _, to_text, doc_id, task, split = request.args
        visuals, text, ended, texts, sample.info = to_text(
            self._document(task, split, doc_id),
            previous_output=[*sample.texts],
            round_idx=number,
            previous_round_info=sample.info,
        )
        _take(sample, texts)
        if ended:
            return None
        conversation = shown_and_asked(visuals, text)
        return Asked(text=text, conversation=lambda: conversation, task=generation)


def _positive(name: str, value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise HidropError(f"{name}={value}: write a whole number from 1 on")
    return int(value)


def _take(sample: _Rounds, texts: Any) -> None:
    """Take over what a task makes of the answers so far, where it says it."""
    if texts is not None:
        sample.texts = [str(text) for text in texts]


def _in_batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Return places in batches that share their generation arguments, longer texts first."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(asked):
        groups.setdefault(repr(sorted(one.task.items())), []).append(i)
    batches = []
    for group in groups.values():
        group.sort(key=lambda i: -len(asked[i].text))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches
