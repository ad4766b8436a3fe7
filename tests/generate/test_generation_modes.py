"""Every mode of `generate` that transformers ships, under the identity schedule (against HF) and under others.

Over 400 lines: the modes are one list, which every way to call `generate` is tested with.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
from hidrop_fx.demo.pictures import picture, questions
from hidrop_fx.models.loading import load_model
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.generation import new_tokens, repeated_together
from tests.support.models import (
    BACKBONES,
    BOS,
    EOS,
    FIRST_WORD,
    IMAGE,
    PAD,
    PRUNED,
    VOCAB,
    Make,
    batch,
    tiny_llava,
)
from tests.support.reference import Reference, reference_generate, split_batch
from tests.support.runtimes import runtime_in

ROW = [5, 6, 7, IMAGE, 8, 5, 6, 7, 8, 5, 6, 7]
"""Repeats itself, so that a lookup in the prompt drafts something in the first call."""
ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 12

each_schedule = pytest.mark.parametrize(
    "schedule", ["identity", PRUNED, PRUNED + ",positions=compact", "prune=2:4,positions=group"]
)


@each_schedule
def test_prompt_lookup_changes_nothing(compiled: Make, plain: Make, schedule: str) -> None:
    model = compiled("qwen2", schedule)
    inputs = batch(model, [ROW])
    rule = runtime_of(model).schedule
    expected = reference_generate(plain("qwen2"), rule, inputs, NEW)
    lengths: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    found = new_tokens(model, inputs, NEW, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)
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
    assert new_tokens(model, inputs, NEW, assistant_model=assistant) == expected


def test_a_compiled_assistant_changes_nothing(compiled: Make) -> None:
    """transformers hands the images to the main model alone, so that a draft model that checks needs text."""
    model, assistant = compiled("qwen2", "identity"), compiled("qwen2", PRUNED)
    inputs = batch(model, [[5, 6, 7, 8, 5, 6, 7]])
    assert new_tokens(model, inputs, NEW, assistant_model=assistant) == new_tokens(
        model, inputs, NEW
    )


def test_a_draft_that_repeats_the_image_token_changes_nothing(compiled: Make) -> None:
    """The prompt looks up what follows 5, 6: an image."""
    model = compiled("qwen2", PRUNED)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 5, 6]])
    found = new_tokens(model, inputs, NEW, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    assert found == new_tokens(model, inputs, NEW)


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
    repeats = any("num_" in name for name in options)
    rows = repeated_together(ROWS, IMAGE) if repeats else ROWS
    for model in (plain(backbone), compiled(backbone, "identity")):
        torch.manual_seed(3)
        found.append(new_tokens(model, batch(model, rows), NEW, **options))
    assert found[1] == found[0]


@each_schedule
def test_sampled_sequences_start_from_one_prefill_each(compiled: Make, schedule: str) -> None:
    """`num_return_sequences` repeats a row before the prefill: each copy is the row's own."""
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    torch.manual_seed(0)
    several = new_tokens(model, inputs, NEW, do_sample=True, num_return_sequences=2, top_k=1)
    assert several[::2] == several[1::2] == new_tokens(model, inputs, NEW)


def test_streaming_from_another_thread_gives_the_same_text(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    inputs = batch(model, [ROW])
    streamer = TextIteratorStreamer(Digits(), skip_prompt=True)
    options = {"streamer": streamer, "do_sample": False, "max_new_tokens": NEW}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(t) for t in new_tokens(model, inputs, NEW, eos_token_id=EOS)[0]]


def test_streaming_to_the_terminal_prints_the_same_text(
    compiled: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = compiled("llama", PRUNED), characters()
    inputs = batch(model, [ROW])
    expected = new_tokens(model, inputs, NEW)[0]
    new_tokens(model, inputs, NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"


@each_schedule
def test_stop_strings_end_their_rows_alone(compiled: Make, schedule: str) -> None:
    """A row ends with the first one it spells, however many tokens that takes, and is padded from then on."""
    model, tokenizer = compiled("llama", schedule), characters()
    inputs = batch(model, ROWS)
    full = new_tokens(model, inputs, NEW)
    stop = tokenizer.decode(full[0][3:5])
    unused = min(set(range(FIRST_WORD, VOCAB)).difference(*full))
    # transformers pads rows that ended only where there is an end token, too.
    options = {"eos_token_id": unused, "pad_token_id": PAD, "tokenizer": tokenizer}
    found = new_tokens(model, inputs, NEW, stop_strings=[stop, "never"], **options)
    width = max(len(through(row, tokenizer, stop)) for row in full)
    for row, text in zip(found, full, strict=True):
        kept = through(text, tokenizer, stop)
        assert row == kept + [PAD] * (width - len(kept))
    assert len(through(full[0], tokenizer, stop)) < NEW


def through(tokens: list[int], tokenizer: Any, stop: str) -> list[int]:
    """Tokens up to the end of the first `stop`; one token is one character."""
    place = tokenizer.decode(tokens).find(stop)
    return tokens if place < 0 else tokens[: place + len(stop)]


def characters() -> Any:
    """A tokenizer for the tiny models: every word of theirs is one character."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    vocabulary |= {chr(30 + token): token for token in range(FIRST_WORD, VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


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


def test_stopping_criteria_and_processors_of_the_caller_are_followed(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    inputs = batch(model, ROWS)
    stop = [AfterFour(inputs["input_ids"].shape[1])]
    full = new_tokens(model, inputs, NEW)
    assert new_tokens(model, inputs, NEW, stopping_criteria=stop) == [row[:4] for row in full]
    only = new_tokens(model, inputs, NEW, logits_processor=LogitsProcessorList([Only(11)]))
    assert only == [[11] * NEW] * len(ROWS)


def test_custom_generate_gives_the_same_tokens(compiled: Make) -> None:
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

    assert new_tokens(model, inputs, NEW, custom_generate=greedy) == new_tokens(model, inputs, NEW)


def test_transformers_does_not_compile_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where transformers would compile on any device."""
    model = hidrop.compile(tiny_llava("llama"), PRUNED, backend="eager")
    inputs = batch(model, [ROW])
    expected = new_tokens(model, inputs, NEW)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("transformers compiled the compiled model")

    monkeypatch.setattr(torch, "compile", refuse)
    config = model.generation_config
    config.compile_config = __import__("transformers").CompileConfig()
    config.compile_config._compile_all_devices = True
    assert new_tokens(model, inputs, NEW) == expected


@each_schedule
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_hidden_states_of_every_layer_are_those_of_the_reference(
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


def test_hidden_states_while_generating_are_those_of_hf(compiled: Make, plain: Make) -> None:
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


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """The shipped model under its schedule, and its processor."""
    model, processor = load_model(MODEL_DIR, device="cpu")
    schedule = hidrop.Schedule.from_json(SCHEDULE_FILE.read_text())
    return hidrop.compile(model, schedule, backend="eager"), processor


@pytest.mark.parametrize("count", [1, 3])
def test_pipeline_answers_as_generate(shipped: tuple[Any, Any], count: int) -> None:
    """Of transformers, given the compiled model: alone, and in a batch of prompts of different lengths."""
    model, processor = shipped
    shown = [picture(seed, "test") for seed in range(count)]
    asked = [questions(one, 0)[2 * seed].prompt_text for seed, one in enumerate(shown)]
    images = [one.image for one in shown]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    before = prefills(model)
    options = {"do_sample": False, "max_new_tokens": 4}
    found = pipe(
        images=images,
        text=asked,
        batch_size=count,
        return_full_text=False,
        generate_kwargs=options,
    )
    assert pipe.model is model
    assert prefills(model) == before + 1
    inputs = processor(images=images, text=asked, padding=True, return_tensors="pt")
    fresh = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(fresh, skip_special_tokens=True)
    assert [one["generated_text"].strip() for one in found] == expected
    assert all(expected)
    assert count == 1 or not inputs["attention_mask"].all()


def prefills(model: Any) -> int:
    """How many prompts the compiled model ran."""
    runtime = runtime_in(model)
    return sum(
        run.calls
        for capture in runtime.programs.captures.values()
        for key, run in capture.executables.items()
        if key[0] == "prefill"
    )


def test_pipeline_answers_a_chat_as_generate(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    shown = picture(0, "test")
    question = questions(shown, 0)[0]
    text = question.prompt_text.split("\n", 1)[1].removesuffix(" ASSISTANT:")
    content = [{"type": "image", "image": shown.image}, {"type": "text", "text": text}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    found = pipe(
        text=[{"role": "user", "content": content}],
        return_full_text=False,
        generate_kwargs={"do_sample": False, "max_new_tokens": 4},
    )
    assert found[0]["generated_text"].strip() == question.answer


@each_schedule
@torch.no_grad()
def test_a_second_turn_of_text_equals_the_reference(
    compiled: Make, plain: Make, schedule: str
) -> None:
    """What the first answer left in the cache, new words of the user, and another answer."""
    model, hf = compiled("llama", schedule), plain("llama")
    inputs = batch(model, ROWS)
    first = model.generate(
        **inputs,
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    words = torch.tensor([[20, 21], [22, 23], [24, 25]])
    ids = torch.cat([first.sequences, words], dim=1)
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
    found = new_tokens(model, turn, max_new_tokens=5)
    given = ids[:, inputs["input_ids"].shape[1] :].tolist()
    assert found == continued_by_the_reference(
        Reference(hf, runtime_of(model).schedule), hf, inputs, given, 5
    )


def continued_by_the_reference(
    reference: Reference, hf: Any, inputs: dict[str, Tensor], given: list[list[int]], new: int
) -> list[list[int]]:
    """Greedy answers of the reference behind a prompt and the tokens given after it."""
    answers = []
    for row, tokens in zip(split_batch(hf, inputs), given, strict=True):
        prompt = reference.prefill(row.input_ids, row.features)
        so_far = list(tokens)
        for column in range(len(tokens) + new - 1):
            logits = reference._decode(so_far[column], prompt.length + column, prompt.caches)
            if column >= len(tokens) - 1:
                so_far.append(int(logits.argmax()))
        answers.append(so_far[len(tokens) :])
    return answers
