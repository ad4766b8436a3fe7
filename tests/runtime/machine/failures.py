"""Steps that go wrong in the middle, and calls beside other threads and processes; the next answer must be right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor

import hidrop_fx as hidrop
from tests.runtime.machine import trouble
from tests.runtime.machine.calls import ONE_BEAM_EACH, logits_of
from tests.runtime.machine.lifecycle import ArmedPass, Lifecycle
from tests.runtime.machine.machine import Prompt, prompts
from tests.runtime.machine.trouble import Trouble

ERRORS: dict[str, type[BaseException]] = {
    "interrupt": KeyboardInterrupt,
    "error": RuntimeError,
    "no memory": torch.OutOfMemoryError,
    "own": Trouble,
}
PLACES = ("embedding", "tower", "projector", "head", "export", "late export", "pass", "buffers")
CALLS = ("forward", "generate", "train", "go on")
_THREAD_SECONDS = 120


class Failures(Lifecycle):
    """Steps that go wrong in the middle."""

    @rule(
        prompt=prompts,
        call=st.sampled_from(CALLS),
        place=st.sampled_from(PLACES),
        error=st.sampled_from(sorted(ERRORS)),
        after=st.integers(1, 5),
    )
    def fail_inside(self, prompt: Prompt, call: str, place: str, error: str, after: int) -> None:
        raised = ERRORS[error]("of the test")
        self.fails(call, prompt, raised, self.failing(place, raised, after))

    @rule(prompt=prompts, call=st.sampled_from(CALLS), after=st.integers(1, 400))
    def interrupt(self, prompt: Prompt, call: str, after: int) -> None:
        """Interrupt a call where it enters any function of the product."""
        raised = KeyboardInterrupt()
        self.fails(call, prompt, raised, trouble.interrupted_in_product(after))

    @rule(
        prompt=prompts,
        kind=st.sampled_from(("streamer", "processor", "criteria")),
        error=st.sampled_from(sorted(ERRORS)),
        after=st.integers(0, 3),
    )
    def fail_in_generate(self, prompt: Prompt, kind: str, error: str, after: int) -> None:
        raised = ERRORS[error]("of the test")
        options: dict[str, Any] = dict(ONE_BEAM_EACH)
        if kind == "streamer":
            options["streamer"] = trouble.FailingStreamer(raised, after)
        elif kind == "processor":
            options["logits_processor"] = [trouble.FailingProcessor(raised, after)]
        else:
            options["stopping_criteria"] = [trouble.FailingCriteria(raised, after)]
        self.raises(lambda: self.model.generate(**prompt.inputs(self.model), **options), raised)
        self.call_forward(prompt)

    @precondition(lambda self: self.trainable)
    @rule(prompt=prompts, error=st.sampled_from(sorted(ERRORS)), head=st.booleans())
    def fail_in_backward(self, prompt: Prompt, error: str, head: bool) -> None:
        raised = ERRORS[error]("of the test")
        names = ("lm_head.weight", "model.language_model.norm.weight")
        weight = dict(self.named_parameters())[names[0] if head else names[1]]
        if not weight.requires_grad:
            weight = next(p for _, p in self.named_parameters() if p.requires_grad)
        self.backward_failed = True
        self.fails("train", prompt, raised, trouble.failing_backward(weight, raised))

    def fails(
        self,
        call: str,
        prompt: Prompt,
        raised: BaseException,
        place: AbstractContextManager[None],
    ) -> None:
        """Make a call that an error may interrupt, then one that none does."""
        if (call == "go on" and not self.kept) or (call == "train" and not self.trainable):
            call = "forward"
        kept = self.kept[0] if self.kept else None
        before = kept.cache.get_seq_length() if kept is not None else 0
        inputs = prompt.inputs(self.model)
        with place:
            self.raises(self.call_of(call, inputs), raised)
        self.model.zero_grad(set_to_none=True)
        if kept is not None and call == "go on":
            now = kept.cache.get_seq_length()
            if now != before:  # it was not interrupted
                kept.cache.crop(before - now)
        self.call_forward(prompt)
        if kept is not None and call == "go on":
            new = torch.full((len(kept.ids), 1), 11)
            self.forward_behind(kept, new, "forward", "no_grad")

    def call_of(self, call: str, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        """Return a call that an error may interrupt."""
        if call == "generate":
            return lambda: self.model.generate(**inputs, **ONE_BEAM_EACH)
        if call == "train":
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels[:, 0] = -100

            def train() -> None:
                output = self.model(**inputs, labels=labels)
                (output[0] if isinstance(output, tuple) else output.loss).backward()

            return train
        if call == "go on":
            kept = self.kept[0]
            new = torch.full((len(kept.ids), 1), 11)
            return lambda: self.attempt(
                torch.no_grad()(lambda: self.model(input_ids=new, past_key_values=kept.cache)),
                *self.allowed_behind(kept),
            )
        return torch.no_grad()(lambda: self.model(**inputs))

    def raises(self, call: Callable[[], Any], raised: BaseException) -> None:
        """Make a call that may raise an error of this kind, as it is or as the cause of ours, and nothing else."""
        found: BaseException | None = None
        try:
            call()
        except BaseException as error:
            found = error
        if found is None:
            note("nothing was raised")
        elif not (found is raised or _is_interrupt(found, raised) or _is_captured(found, raised)):
            raise found

    @contextmanager
    def failing(self, place: str, error: BaseException, after: int) -> Iterator[None]:
        if place == "pass":
            ArmedPass.error = error
            try:
                yield
            finally:
                ArmedPass.error = None
            return
        base = self.base
        contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "embedding": lambda: trouble.failing_module(base.get_input_embeddings(), error),
            "tower": lambda: trouble.failing_module(base.model.vision_tower, error),
            "projector": lambda: trouble.failing_module(base.model.multi_modal_projector, error),
            "head": lambda: trouble.failing_module(base.lm_head, error),
            "export": lambda: trouble.failing_export(error, late=False),
            "late export": lambda: trouble.failing_export(error, late=True),
            "buffers": lambda: trouble.no_memory(error, after),
        }
        with contexts[place]():
            yield

    # Others beside.

    @rule(first=prompts, second=prompts, generate=st.booleans())
    def two_threads(self, first: Prompt, second: Prompt, generate: bool) -> None:
        """Call from two threads at once, after a first call of each kind, which none may run beside."""
        batches = [prompt.inputs(self.model) for prompt in (first, second)]
        calls = [self.call_of("generate" if generate else "forward", given) for given in batches]
        expected = [_values(call()) for call in calls]
        found: list[Any] = [None, None]
        barrier = threading.Barrier(2)

        def run(index: int) -> None:
            barrier.wait(_THREAD_SECONDS)
            try:
                found[index] = _values(calls[index]())
            except BaseException as error:
                found[index] = error

        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_THREAD_SECONDS)
            assert not thread.is_alive(), "two threads wait for each other"
        for mine, alone in zip(found, expected, strict=True):
            assert isinstance(mine, Tensor), f"in a thread: {mine!r}"
            self.agree(mine, alone, "in a thread")

    @rule(prompt=prompts, warm=st.sampled_from((True, True, False)))
    def forked_child(self, prompt: Prompt, warm: bool) -> None:
        """Call from a forked child, which gives the parent's answer, as the parent does afterwards."""
        inputs = prompt.inputs(self.model)
        call = torch.no_grad()(lambda: logits_of(self.model(**inputs)))
        if warm:
            expected = call()
        else:
            assert trouble.holds_in_child(lambda: call() is not None), "a child failed"
            expected = call()
        assert trouble.holds_in_child(
            lambda: torch.allclose(call(), expected, rtol=1e-3, atol=1e-3)
        ), "a child gave another answer"
        self.call_forward(prompt)


def _is_interrupt(found: BaseException, raised: BaseException) -> bool:
    return isinstance(found, KeyboardInterrupt) and isinstance(raised, KeyboardInterrupt)


def _is_captured(found: BaseException, raised: BaseException) -> bool:
    return isinstance(found, hidrop.CaptureError) and found.__cause__ is raised


def _values(answer: Any) -> Tensor:
    found: Tensor = answer if isinstance(answer, Tensor) else logits_of(answer)
    return found.double()
