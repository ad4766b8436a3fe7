"""Every mode of `generate` that transformers ships, under the identity schedule (against HF) and under others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import PRUNED, Make
from reference import Reference, reference_generate, split_batch
from tiny import BACKBONES, EOS, IMAGE, batch, tiny_llava
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
)

import hidrop_fx as hidrop
from hidrop_fx.runtime.binding import runtime_of

ROW = [5, 6, 7, IMAGE, 8, 5, 6, 7, 8, 5, 6, 7]
"""Repeats itself, so that a lookup in the prompt drafts something in the first call."""
ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 12

each_schedule = pytest.mark.parametrize(
    "schedule", ["identity", PRUNED, PRUNED + ",positions=compact", "prune=2:4,positions=group"]
)


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW} | options
    with torch.no_grad():
        tokens = model.generate(**inputs, **options)
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


@each_schedule
def test_prompt_lookup_changes_nothing(compiled: Make, plain: Make, schedule: str) -> None:
    model = compiled("qwen2", schedule)
    inputs = batch(model, [ROW])
    rule = runtime_of(model).schedule
    expected = reference_generate(plain("qwen2"), rule, inputs, NEW)
    lengths: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    found = generated(model, inputs, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)
    hook.remove()
    assert found == expected
    assert lengths[0] > 1, "nothing was drafted along with the prompt"
    assert len(lengths) <= NEW


@each_schedule
@pytest.mark.parametrize("same", [True, False])
def test_an_assistant_changes_nothing(
    compiled: Make, plain: Make, schedule: str, same: bool
) -> None:
    """With the same weights it is always right (under identity), with others nearly never."""
    model = compiled("qwen2", schedule)
    inputs = batch(model, [ROW])
    expected = reference_generate(plain("qwen2"), runtime_of(model).schedule, inputs, NEW)
    assistant = plain("qwen2") if same else plain("qwen2", seed=1)
    assert generated(model, inputs, assistant_model=assistant) == expected


def test_a_compiled_assistant(compiled: Make) -> None:
    """transformers hands the images to the main model alone, so that a draft model that checks needs text."""
    model, assistant = compiled("qwen2", "identity"), compiled("qwen2", PRUNED)
    inputs = batch(model, [[5, 6, 7, 8, 5, 6, 7]])
    assert generated(model, inputs, assistant_model=assistant) == generated(model, inputs)


def test_a_draft_may_repeat_the_image_token(compiled: Make) -> None:
    """The prompt looks up what follows 5, 6: an image."""
    model = compiled("qwen2", PRUNED)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 5, 6]])
    found = generated(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    assert found == generated(model, inputs)


def test_the_cache_after_assisted_decoding_goes_on(compiled: Make) -> None:
    model = compiled("qwen2", PRUNED)
    inputs = batch(model, [ROW])
    caches = []
    for options in ({}, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}):
        with torch.no_grad():
            output = model.generate(
                **inputs,
                do_sample=False,
                eos_token_id=None,
                max_new_tokens=NEW,
                return_dict_in_generate=True,
                **options,
            )
        caches.append(output.past_key_values)
    plain_cache, assisted = caches
    surplus = assisted.get_seq_length() - plain_cache.get_seq_length()
    if surplus > 0:
        assisted.crop(-surplus)
    for ours, theirs in zip(assisted.layers, plain_cache.layers, strict=True):
        assert ours.filled == theirs.filled
        torch.testing.assert_close(
            ours.keys[:, :, : ours.filled],
            theirs.keys[:, :, : theirs.filled],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.5},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 40))},
    ],
    ids=lambda options: "-".join(options),
)
def test_identity_is_hf_in_every_mode(
    plain: Make, compiled: Make, backbone: str, options: dict[str, Any]
) -> None:
    found = []
    for model in (plain(backbone), compiled(backbone, "identity")):
        torch.manual_seed(3)
        found.append(generated(model, batch(model, ROWS), **options))
    assert found[1] == found[0]


@each_schedule
def test_sampled_sequences_start_from_one_prefill_each(compiled: Make, schedule: str) -> None:
    """`num_return_sequences` repeats a row before the prefill: each copy is the row's own."""
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    torch.manual_seed(0)
    several = generated(model, inputs, do_sample=True, num_return_sequences=2, top_k=1)
    assert several[::2] == several[1::2] == generated(model, inputs)


def test_streaming_from_another_thread(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    inputs = batch(model, [ROW])
    streamer = TextIteratorStreamer(Digits(), skip_prompt=True)
    options = {"streamer": streamer, "do_sample": False, "max_new_tokens": NEW}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(t) for t in generated(model, inputs, eos_token_id=EOS)[0]]


class Digits:
    """As much of a tokenizer as a streamer needs: a token is its number."""

    def decode(self, tokens: Any, **options: Any) -> str:
        return "".join(f"{int(t)} " for t in tokens)


class AfterFour(StoppingCriteria):
    def __init__(self, prompt: int) -> None:
        self.stop = prompt + 4

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop)


class Only(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, self.token] = 0.0
        return chosen


def test_stopping_criteria_and_processors(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    inputs = batch(model, ROWS)
    stop = [AfterFour(inputs["input_ids"].shape[1])]
    full = generated(model, inputs)
    assert generated(model, inputs, stopping_criteria=stop) == [row[:4] for row in full]
    only = generated(model, inputs, logits_processor=LogitsProcessorList([Only(11)]))
    assert only == [[11] * NEW] * len(ROWS)


def test_a_loop_of_the_callers_own(compiled: Make) -> None:
    """`custom_generate` gets a prepared cache, and calls the model as HF's loops do."""
    model = compiled("llama", PRUNED)
    inputs = batch(model, ROWS)

    def greedy(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        kwargs.pop("logits_processor"), kwargs.pop("stopping_criteria")
        config = kwargs.pop("generation_config")
        for step in range(config.max_new_tokens):
            prepared = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=None if step == 0 else 1,
                is_first_iteration=step == 0,
                **{k: v for k, v in kwargs.items() if v is not None},
            )
            output = model(**prepared, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(output, kwargs)
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    assert generated(model, inputs, custom_generate=greedy) == generated(model, inputs)


def test_nothing_is_compiled_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where transformers would compile on any device."""
    model = hidrop.compile(tiny_llava("llama"), PRUNED, backend="eager")
    inputs = batch(model, [ROW])
    expected = generated(model, inputs)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("transformers compiled the compiled model")

    monkeypatch.setattr(torch, "compile", refuse)
    config = model.generation_config
    config.compile_config = __import__("transformers").CompileConfig()
    config.compile_config._compile_all_devices = True
    assert generated(model, inputs) == expected


@each_schedule
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_hidden_states_of_every_layer(
    compiled: Make, plain: Make, schedule: str, padding: Any
) -> None:
    """Padded to the prompt's length: zero where a layer did not see a token."""
    model, hf = compiled("llama", schedule), plain("llama")
    inputs = batch(model, ROWS, padding=padding)
    found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(hf.get_decoder().layers) + 1
    reference = Reference(hf, runtime_of(model).schedule)
    for b, row in enumerate(split_batch(hf, inputs)):
        result = reference.prefill(row.input_ids, row.features)
        for k, columns in enumerate(result.columns[:-1]):
            seen = found.hidden_states[k + 1][b]
            places = row.places[columns]
            absent = torch.ones(len(seen), dtype=torch.bool).index_fill(0, places, False)
            assert not seen[absent].any()
            assert seen[places].abs().sum(-1).min() > 0
        last = found.hidden_states[-1][b, row.places[result.surviving]]
        torch.testing.assert_close(last, result.hidden, rtol=1e-4, atol=1e-4)
    if schedule == "identity":
        expected = hf(**inputs, output_hidden_states=True).hidden_states
        real = inputs["attention_mask"].bool()
        for ours, theirs in zip(found.hidden_states, expected, strict=True):
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_hidden_states_while_generating(compiled: Make, plain: Make) -> None:
    outputs = []
    for model in (plain("llama"), compiled("llama", "identity")):
        with torch.no_grad():
            outputs.append(
                model.generate(
                    **batch(model, [ROW]),
                    do_sample=False,
                    eos_token_id=None,
                    max_new_tokens=3,
                    output_hidden_states=True,
                    return_dict_in_generate=True,
                )
            )
    theirs, ours = outputs
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for state, other in zip(step, expected, strict=True):
            torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-4)
