"""Steps that call the model: forward, generate, a kept cache that goes on, training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor

from hidrop_fx.runtime.kv.cache import HidropCache
from tests.runtime.machine.answers import (
    Tail,
    assert_close,
    following,
    generated,
    supervised_loss,
)
from tests.runtime.machine.fresh_models import base_of, weights_of
from tests.runtime.machine.machine import (
    ENVIRONMENTS,
    OTHER_CACHE,
    Kept,
    Machine,
    Prompt,
    environments,
    prompts,
)
from tests.support.models import random_labels

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "long": {"max_new_tokens": 10},
    "early ends": {"eos_token_id": list(range(20, 60)), "pad_token_id": 0},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "sampled twice": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "two beams back": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
GREEDY = ("greedy", "long", "early ends", "lookup", "penalty")
ONE_BEAM_EACH = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

# A step of training moves every weight by about so much.
_RATE = 0.02


class Calls(Machine):
    """Steps that call the model."""

    @rule(prompt=prompts, environment=environments, keep=st.booleans())
    def forward(self, prompt: Prompt, environment: str, keep: bool) -> None:
        self.call_forward(prompt, environment, keep)

    def call_forward(self, prompt: Prompt, environment: str = "no_grad", keep: bool = False) -> Any:
        inputs = prompt.inputs(self.model)
        before = torch.get_rng_state()
        with ENVIRONMENTS[environment]():
            output = self.model(**inputs)
        assert torch.equal(torch.get_rng_state(), before), "random state"
        self.check_forward(output, prompt, environment)
        if keep and self.compiled and not self.training and environment != "autocast":
            self.keep_prompt(output, prompt, inputs)
        return output

    def check_forward(self, output: Any, prompt: Prompt, environment: str) -> None:
        logits, loose = logits_of(output), environment == "autocast"
        self.agree_with_before((prompt, environment, self.training), logits)
        if self.compiled:
            prompted = self.prompted(prompt)
            if prompted.gap < (0.3 if loose else self.closeness.gap):
                note("a cut too close to call")
                return
            self.agree(logits, prompted.logits(), "logits", loose)
            return
        fresh = self.fresh()
        with ENVIRONMENTS[environment]():
            expected = logits_of(fresh(**prompt.inputs(fresh)))
        self.agree(logits, expected, "logits of transformers", loose)

    def keep_prompt(self, output: Any, prompt: Prompt, inputs: dict[str, Tensor]) -> None:
        cache = getattr(output, "past_key_values", None)
        prompted = self.prompted(prompt)
        self.keep(
            Kept(
                cache=cache,
                tails=prompted.tails,
                ids=inputs["input_ids"],
                mask=inputs["attention_mask"],
                structure=self.structure,
                dtype=self.traits.dtype,
                doubtful=prompted.gap < self.closeness.gap,
                right=prompt.padding == "right",
            )
        )

    # generate.

    @rule(
        prompt=prompts,
        mode=st.sampled_from(sorted(MODES)),
        count=st.integers(1, 4),
        keep=st.booleans(),
    )
    def generate(self, prompt: Prompt, mode: str, count: int, keep: bool) -> None:
        inputs = prompt.inputs(self.model)
        if mode == "lookup" and len(prompt.rows) > 1:
            mode = "greedy"
        options = {**ONE_BEAM_EACH, "max_new_tokens": count, **MODES[mode]}
        keep = keep and self.compiled and mode in ("greedy", "long")
        torch.manual_seed(7)
        given = {"return_dict_in_generate": True} if keep else {}
        output = self.model.generate(**inputs, **options, **given)
        sequences = output.sequences if keep else output
        self.agree_with_before((prompt, mode, count, self.training), sequences)
        options.pop("prompt_lookup_num_tokens", None)
        tails = self.check_generated(prompt, sequences, options, exact=mode in GREEDY)
        if keep and tails is not None:
            held = sequences[:, :-1]
            more = held.shape[1] - inputs["input_ids"].shape[1]
            self.keep(
                Kept(
                    cache=output.past_key_values,
                    tails=tails,
                    ids=held,
                    mask=torch.cat(
                        [
                            inputs["attention_mask"],
                            inputs["attention_mask"].new_ones(len(held), more),
                        ],
                        dim=1,
                    ),
                    structure=self.structure,
                    dtype=self.traits.dtype,
                    doubtful=False,
                    right=prompt.padding == "right",
                )
            )

    def check_generated(
        self, prompt: Prompt, found: Tensor, options: dict[str, Any], *, exact: bool
    ) -> list[Tail] | None:
        """Hold an answer against the reference's; return its ends, None where nothing can be said."""
        fresh = self.fresh()
        inputs = prompt.inputs(fresh)
        torch.manual_seed(7)
        if not self.compiled:
            assert torch.equal(found, fresh.generate(**inputs, **options)), "tokens of transformers"
            return None
        prompted, base = self.prompted(prompt), base_of(fresh)
        expected = generated(
            base,
            self.schedule,
            inputs["input_ids"],
            inputs["attention_mask"],
            prompted.tails,
            **options,
        )
        doubtful = (
            prompted.gap < self.closeness.gap
            or expected.margin < self.closeness.margin
            or (not exact and self.traits.dtype is torch.bfloat16)
        )
        if doubtful:
            note("a choice too close to call")
            return None
        assert found.tolist() == expected.sequences.tolist(), "tokens"
        rows = found[:, inputs["input_ids"].shape[1] : -1].tolist()
        known = {(b, tuple(row)) for b, row in enumerate(rows)}
        if not known <= expected.tails.keys():
            return None
        return [expected.tails[b, tuple(row)] for b, row in enumerate(rows)]

    # A kept cache that goes on.

    @precondition(lambda self: self.kept)
    @rule(
        which=st.integers(0, 2),
        tokens=st.lists(st.integers(3, 90), min_size=1, max_size=3),
        how=st.sampled_from(("forward", "forward", "mask", "generate", "copy", "crop")),
        environment=st.sampled_from(("grad", "no_grad", "no_grad", "inference")),
    )
    def go_on(self, which: int, tokens: list[int], how: str, environment: str) -> None:
        kept = self.kept[which % len(self.kept)]
        rows = len(kept.ids)
        new = torch.tensor([[token + b for token in tokens] for b in range(rows)])
        if how == "copy":
            twin = copy.deepcopy(kept.cache)
            with ENVIRONMENTS[environment]():
                self.attempt(lambda: self.model(input_ids=new, past_key_values=twin), *OTHER_CACHE)
        if how == "generate" and not kept.right:
            self.generate_behind(kept, new)
        else:
            self.forward_behind(kept, new, how, environment)

    def forward_behind(self, kept: Kept, new: Tensor, how: str, environment: str) -> None:
        inputs: dict[str, Any] = {"input_ids": new, "past_key_values": kept.cache}
        mask = torch.cat([kept.mask, kept.mask.new_ones(new.shape)], dim=1)
        if how == "mask":
            inputs["attention_mask"] = mask
        if how == "crop":
            with torch.no_grad():
                done = self.attempt(
                    lambda: self.model(input_ids=new.flip(1), past_key_values=kept.cache),
                    *self.allowed_behind(kept),
                )
            if done is not None:
                kept.cache.crop(-new.shape[1])
        before = kept.cache.get_seq_length()
        with ENVIRONMENTS[environment]():
            output = self.attempt(lambda: self.model(**inputs), *self.allowed_behind(kept))
        if output is None:
            assert kept.cache.get_seq_length() == before, "a refused call changed the cache"
            return
        tails, expected = self.tails_behind(kept, new)
        if not kept.doubtful:
            self.agree(logits_of(output), torch.stack(expected, dim=1), "logits behind a cache")
        kept.tails, kept.ids, kept.mask = tails, torch.cat([kept.ids, new], dim=1), mask

    def tails_behind(self, kept: Kept, new: Tensor) -> tuple[list[Tail], list[Tensor]]:
        """Return the rows with new tokens, and the logits [B, V] of each of these."""
        assert kept.dtype is self.traits.dtype, "a cache of another dtype was taken"
        model, tails, logits = base_of(self.fresh()), kept.tails, []
        for column in new.T.tolist():
            tails = [
                following(model, self.schedule, tail, token)
                for tail, token in zip(tails, column, strict=True)
            ]
            logits.append(torch.stack([tail.logits for tail in tails]))
        return tails, logits

    def generate_behind(self, kept: Kept, new: Tensor) -> None:
        ids = torch.cat([kept.ids, new], dim=1)
        mask = torch.cat([kept.mask, kept.mask.new_ones(new.shape)], dim=1)
        before = kept.cache.get_seq_length()
        found = self.attempt(
            lambda: self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=kept.cache, **ONE_BEAM_EACH
            ),
            *self.allowed_behind(kept),
        )
        if found is None:
            assert kept.cache.get_seq_length() == before, "a refused call changed the cache"
            return
        tails, _ = self.tails_behind(kept, new)
        expected = generated(
            base_of(self.fresh()), self.schedule, ids, mask, tails, **ONE_BEAM_EACH
        )
        if kept.doubtful or expected.margin < self.closeness.margin:
            self.kept = [other for other in self.kept if other is not kept]
            return
        assert found.tolist() == expected.sequences.tolist(), "tokens behind a cache"
        rows = found[:, ids.shape[1] : -1].tolist()
        kept.tails = [expected.tails[b, tuple(row)] for b, row in enumerate(rows)]
        kept.ids = found[:, :-1]
        kept.mask = torch.cat([mask, mask.new_ones(len(rows), len(rows[0]))], dim=1)

    def allowed_behind(self, kept: Kept) -> tuple[str, ...]:
        """Return the refusals that are right: of a cache whose model has changed since."""
        return OTHER_CACHE if kept.structure != self.structure or not self.compiled else ()

    def a_cache_of_the_other_kind(self, prompt: Prompt) -> None:
        """Give a compiled model transformers' cache, and one that is not compiled ours."""
        if self.compiled and self.training:
            return
        fresh, inputs = self.fresh(), prompt.inputs(self.model)
        with torch.no_grad():
            cache = fresh(**inputs, use_cache=True, return_dict=True).past_key_values
            if not self.compiled:
                cache = next((kept.cache for kept in self.kept), HidropCache())
            new = inputs["input_ids"].new_full((len(inputs["input_ids"]), 1), 9)
            found = self.attempt(
                lambda: self.model(input_ids=new, past_key_values=cache), *OTHER_CACHE
            )
        assert found is None or not self.compiled, "a cache of transformers was taken"

    # Training.

    @precondition(lambda self: self.trainable)
    @rule(
        prompt=prompts,
        second=st.none() | prompts,
        seed=st.integers(0, 3),
        step=st.booleans(),
        keep_mode=st.booleans(),
    )
    def train_step(
        self, prompt: Prompt, second: Prompt | None, seed: int, step: bool, keep_mode: bool
    ) -> None:
        """Run one backward for one or two forwards, and perhaps a step of an optimizer."""
        if not keep_mode and not self.training:
            self.set_mode(True)
        batches = [self.labelled(prompt, seed)]
        batches += [] if second is None else [self.labelled(second, seed + 1)]
        expected, gap = self.expected_gradients(batches)
        self.model.zero_grad(set_to_none=True)
        outputs = [self.model(**inputs) for inputs in batches]
        losses = [output[0] if isinstance(output, tuple) else output.loss for output in outputs]
        loss = torch.stack(losses).sum()
        loss.backward()
        found = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        if gap < self.closeness.gap:
            note("a cut too close to call")
        else:
            value, gradients = expected
            penalty = len(batches) * self.penalty() if self.training else 0.0
            without = (loss.detach() - penalty).to(value.dtype)
            torch.testing.assert_close(
                without, value, rtol=1e-3, atol=1e-4, msg=lambda m: f"loss: {m}"
            )
            named = set(found) - {"hidrop_ratios.values"}
            assert named == set(gradients), f"gradients of {sorted(named ^ set(gradients))}"
            for name, gradient in gradients.items():
                assert_close(found[name], gradient, self.closeness, f"gradient of {name}")
        if step:
            self.step(found)
        self.model.zero_grad(set_to_none=True)

    def labelled(self, prompt: Prompt, seed: int) -> dict[str, Tensor]:
        inputs = prompt.inputs(self.model)
        labels = random_labels(inputs, seed=seed)
        labels[:, 0] = -100  # which transformers lets a pad predict
        last = inputs["attention_mask"].cumsum(dim=1).argmax(dim=1)
        rows = torch.arange(len(last))
        labels[rows, last] = inputs["input_ids"][rows, last]
        return inputs | {"labels": labels}

    def expected_gradients(
        self, batches: list[dict[str, Tensor]]
    ) -> tuple[tuple[Tensor, dict[str, Tensor]], float]:
        """Return loss and gradients of a fresh model, and the least gap of its cuts."""
        fresh, gap = self.fresh(), float("inf")
        total = torch.zeros((), dtype=self.traits.dtype)
        for inputs in batches:
            if self.compiled:
                loss, least = supervised_loss(base_of(fresh), self.schedule, inputs, self.learned())
                gap = min(gap, least)
            else:
                loss = fresh(**inputs, return_dict=True).loss
            total = total + loss
        total.backward()
        found = {n: p.grad for n, p in base_of(fresh).named_parameters() if p.grad is not None}
        return (total.detach(), found), gap

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.base.named_parameters())

    def penalty(self) -> Tensor | float:
        return self.base.hidrop_ratios.penalty().detach() if self.ratios is not None else 0.0

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Take a step of plain gradient descent, in which no weight moves far."""
        parameters = dict(self.named_parameters())
        groups = []
        for name, gradient in gradients.items():
            size = float(gradient.abs().max())
            groups.append({"params": [parameters[name]], "lr": _RATE / (size + 1e-6)})
        torch.optim.SGD(groups, lr=0.0).step()
        self.weights = weights_of(self.model)
        if self.ratios is not None:
            self.ratios = self.base.hidrop_ratios.values.detach().clone()
        self.note_change(structure=False)

    def set_mode(self, training: bool) -> None:
        self.model.train(training)
        self.training = training
        self.note_change()


def logits_of(output: Any) -> Tensor:
    """Return the logits of a forward without labels, whatever it returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return found
