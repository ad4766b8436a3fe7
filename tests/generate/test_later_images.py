"""New images in a later turn, behind a cache: against the eager reference, which goes on with the state of its earlier turns."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.program.outputs import columns_output
from tests.support.models import IMAGE, PAD, Make, Row, batch, tiny_llava
from tests.support.reference import LayerCache, Reference, RowResult, split_batch
from tests.support.runtimes import runtime_in

SCHEDULE = "inject=1,prune=1:6+2:3,exit=3"
FIRST: list[Row] = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
SECOND: list[Row] = [[20, IMAGE, 21, 22], [23, IMAGE, IMAGE, 24], [25, 26]]
THIRD: list[Row] = [[30, 31], [IMAGE, 32], [33, IMAGE, 34, 35, IMAGE]]
NEW = 4


@dataclass
class Conversation:
    """Rows of the reference, each with what its turns left."""

    hf: Any
    reference: Reference
    rows: int
    caches: list[list[LayerCache] | None] = field(init=False)
    lengths: list[int] = field(init=False)
    pending: list[list[int]] = field(init=False)
    """Tokens that were answered and not read."""

    def __post_init__(self) -> None:
        self.caches, self.lengths = [None] * self.rows, [0] * self.rows
        self.pending = [[] for _ in self.lengths]

    def prompt(self, inputs: dict[str, Tensor]) -> list[RowResult]:
        """Read a prompt, or a later turn's."""
        found = []
        for k, row in enumerate(split_batch(self.hf, inputs)):
            ids = torch.cat([row.input_ids.new_tensor(self.pending[k]), row.input_ids])
            result = self.reference.prefill(
                ids, row.features, past=self.caches[k], start=self.lengths[k]
            )
            self.caches[k] = result.caches
            self.lengths[k] += result.length
            found.append(result)
        return found

    def token(self, row: int, token: int) -> Tensor:
        """Read one more token, and return the logits behind it."""
        caches = self.caches[row]
        assert caches is not None
        logits = self.reference._decode(token, self.lengths[row], caches)
        self.lengths[row] += 1
        return logits

    def answer(self, results: list[RowResult], new: int) -> list[list[int]]:
        """Answer greedily; the last token is read with the turn behind it."""
        answers = []
        for k, result in enumerate(results):
            logits, tokens = result.logits[-1], []
            for count in range(new):
                tokens.append(int(logits.argmax()))
                if count < new - 1:
                    logits = self.token(k, tokens[-1])
            answers.append(tokens)
            self.pending[k] = tokens[-1:]
        return answers


def turn_of(model: Any, first: Any, rows: list[Row], mask: Tensor, seed: int) -> dict[str, Any]:
    """Return the arguments of `generate` for a later turn: all tokens, and the images that are new."""
    new = batch(model, rows, seed=seed)
    ids = torch.cat([first.sequences, new["input_ids"]], dim=1)
    answered = mask.new_ones(len(mask), first.sequences.shape[1] - mask.shape[1])
    given = {
        "input_ids": ids,
        "attention_mask": torch.cat([mask, answered, new["attention_mask"]], dim=1),
        "past_key_values": first.past_key_values,
    }
    pixels = {k: v for k, v in new.items() if k == "pixel_values"}
    return given | pixels


def generated(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )


def kept_by(model: Any, rows: int) -> list[dict[int, list[list[int]]]]:
    """Note the vision columns that each prompt's prunes leave, row by row, as `RowResult.kept`."""
    noted: list[dict[int, list[list[int]]]] = []

    def note(prepared: Any, outputs: dict[str, Tensor]) -> None:
        if prepared.kind == "decode":
            return
        layout, found = prepared.context.layout, {}
        ranks = prepared.context.prompt.valid.cumsum(dim=1) - 1
        for event in layout.plan.of_kind("prune"):
            columns = outputs[columns_output(event.name)]
            vision = layout.is_vision.gather(1, columns)
            kept = zip(ranks, columns, vision, strict=True)
            found[event.layer] = [rank[row[is_vision]].tolist() for rank, row, is_vision in kept]
        noted.append(found)

    runtime_in(model).on_outputs.append(note)
    return noted


def check_conversation(model: Any, hf: Any, turns: list[list[Row]]) -> None:
    """Hold tokens, kept columns, cache lengths, columns and position ids of every turn against the reference."""
    schedule = runtime_in(model).schedule
    told = Conversation(hf, Reference(hf, schedule), len(turns[0]))
    noted = kept_by(model, len(turns[0]))
    first, mask = None, None
    for number, rows in enumerate(turns):
        given: dict[str, Any] = batch(model, rows)
        if mask is not None:
            given = turn_of(model, first, rows, mask, seed=number)
        new = batch(hf, rows, seed=number)
        results = told.prompt(new)
        first = generated(model, given)
        answers = first.sequences[:, -NEW:].tolist()
        cache = first.past_key_values
        if "pixel_values" in new:
            for layer, kept in noted[-1].items():
                expected = [result.kept.get(layer, []) for result in results]
                assert kept == expected, f"turn {number}, layer {layer}"
        assert answers == told.answer(results, NEW), f"turn {number}"
        check_cache(cache, told)
        mask = given["attention_mask"]


def check_cache(cache: Any, told: Conversation) -> None:
    """Hold columns, keys (which position ids turned) and lengths of each layer against the reference."""
    for k, layer in enumerate(cache.layers):
        shown = cache.log.shown(layer.segment)
        columns = cache.log.columns_of(layer.segment)
        assert layer.filled == shown.shape[1]
        for row, caches in enumerate(told.caches):
            assert caches is not None
            held = caches[k].columns
            own = columns[row][shown[row]]
            assert len(own) == len(held)
            start = int(cache.log.row_starts[row])
            assert (own - start).tolist() == held
            keys = layer.keys[row, :, : layer.filled][:, shown[row]].transpose(0, 1)
            torch.testing.assert_close(keys, caches[k].keys, rtol=1e-4, atol=1e-5)
    for row, caches in enumerate(told.caches):
        assert caches is not None
        assert int(cache.log.next_ids("text")[row]) == caches[-1].ids[-1] + 1


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("identity", marks=pytest.mark.slow),
        SCHEDULE,
        f"{SCHEDULE},scoring=agnostic",
        "inject=1,prune=2:5+3:2,score=previous_layer",
        pytest.param("prune=1:0.5,score=all_text", marks=pytest.mark.slow),
        pytest.param("inject=1,prune=2:5,score=state_change", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_new_images_in_later_turns_equal_the_reference(
    compiled: Make, plain: Make, schedule: str
) -> None:
    """Three rows, some of which get an image in each turn, one or two; turns of unequal length, padded on the left."""
    check_conversation(compiled("llama", schedule), plain("llama"), [FIRST, SECOND, THIRD])


def read(model: Any, rows: list[Row], seed: int = 0, cache: Any = None, **options: Any) -> Any:
    """Call the model on a prompt, or on a turn behind a cache; padded as `options` of `batch` say."""
    inputs = batch(model, rows, seed=seed, **options)
    if cache is None:
        return model(**inputs)
    past = cache.log.continued_mask(0)
    mask = torch.cat([past.long(), inputs["attention_mask"]], dim=1)
    return model(**inputs | {"attention_mask": mask}, past_key_values=cache)


@torch.no_grad()
def test_turns_padded_on_the_right_and_hidden_tokens_equal_each_row_alone(compiled: Make) -> None:
    """A turn of text padded on the right, then one with images; each row as it is without padding."""
    model = compiled("llama", SCHEDULE)
    turns: list[list[Row]] = [FIRST, [[40, 41, 42], [43], [44, 45]], SECOND]
    cache = None
    for number, rows in enumerate(turns):
        found = read(model, rows, seed=number, cache=cache, padding="right")
        cache = found.past_key_values
    following = torch.full((3, 1), 33)
    behind = model(input_ids=following, past_key_values=cache).logits[:, -1]
    images = 0
    for row in range(3):
        alone = None
        for number, rows in enumerate(turns):
            inputs = batch(model, rows, seed=number)
            own = batch(model, [rows[row]])
            before = sum(item == IMAGE for other in rows[:row] for item in other)
            count = sum(item == IMAGE for item in rows[row])
            if count:
                own["pixel_values"] = inputs["pixel_values"][before : before + count]
                images += count
            out = model(
                input_ids=own["input_ids"],
                pixel_values=own.get("pixel_values"),
                past_key_values=alone,
            )
            alone = out.past_key_values
        last = len(own["input_ids"][0]) - 1
        torch.testing.assert_close(found.logits[row, last], out.logits[0, -1], rtol=1e-4, atol=1e-4)
        expected = model(input_ids=following[:1], past_key_values=alone).logits[0, -1]
        torch.testing.assert_close(behind[row], expected, rtol=1e-4, atol=1e-4)
    assert images == 6


@torch.no_grad()
def test_a_failed_turn_leaves_the_cache_as_it_was(
    compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled("llama", SCHEDULE)
    caches = [read(model, FIRST).past_key_values for _ in range(2)]

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("hidrop_fx.runtime.runtime.execute", fail)
        with pytest.raises(MemoryError):
            read(model, SECOND, seed=1, cache=caches[0])
    assert [layer.filled for layer in caches[0].layers] == [
        layer.filled for layer in caches[1].layers
    ]
    logits = [read(model, SECOND, seed=1, cache=cache).logits for cache in caches]
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_cache_is_cropped_to_its_last_prompt_with_images(compiled: Make) -> None:
    model = compiled("llama", SCHEDULE)
    cache = read(model, FIRST).past_key_values
    read(model, SECOND, seed=1, cache=cache)
    token = torch.full((3, 1), 33)
    expected = model(input_ids=token, past_key_values=cache).logits
    cache.crop(-1)
    torch.testing.assert_close(model(input_ids=token, past_key_values=cache).logits, expected)
    with pytest.raises(hidrop.CacheError, match=r"cannot crop 2 tokens: 1 came after the prompt"):
        cache.crop(-2)


@torch.no_grad()
def test_turns_are_as_without_cuda_graphs() -> None:
    """The turn itself runs without a graph, on memory that recorded steps go on with."""
    found = []
    for graphs in (False, True):
        model = hidrop.compile(tiny_llava("llama"), SCHEDULE, backend="eager", cuda_graphs=graphs)
        first = generated(model, batch(model, FIRST))
        mask = batch(model, FIRST)["attention_mask"]
        second = generated(model, turn_of(model, first, SECOND, mask, seed=1))
        found.append(second.sequences.tolist())
    assert found[0] == found[1]


@torch.no_grad()
def test_several_answers_behind_images_of_the_whole_conversation(compiled: Make) -> None:
    """`generate` repeats images by the places of all tokens; a copied and a pickled cache go on alike."""
    model = compiled("llama", SCHEDULE)
    first = generated(model, batch(model, FIRST))
    several, pickled = (pickle.loads(pickle.dumps(first.past_key_values)) for _ in range(2))
    mask, old = batch(model, FIRST)["attention_mask"], batch(model, FIRST)["pixel_values"]
    given = turn_of(model, first, SECOND, mask, seed=1)
    new = given["pixel_values"]
    greedy = generated(model, given).sequences
    assert torch.equal(generated(model, given | {"past_key_values": pickled}).sequences, greedy)
    several.batch_repeat_interleave(2)
    given["pixel_values"] = torch.cat([old[:1], new[:3], old[1:]])  # row after row
    found = model.generate(
        **given | {"past_key_values": several},
        max_new_tokens=NEW,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    assert torch.equal(found, greedy.repeat_interleave(2, dim=0))


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_equals_the_reference(plain: Make) -> None:
    model = hidrop.compile(tiny_llava("llama"), SCHEDULE, backend="inductor", lowering="bodies")
    check_conversation(model, plain("llama"), [FIRST, SECOND, THIRD])
    assert not runtime_in(model).programs.log.fallbacks


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("prune=1:4,positions=compact", "positions='compact' numbers tokens anew"),
        ("prune=1:4,merge=nearest_key", "the schedule has merge='nearest_key'"),
        ("cache=snapkv(window=2,capacity=5)", r"the schedule has cache=.snapkv"),
        ("before=divprune(ratio=0.5)", r"the schedule has before='divprune"),
        ("prune=1:4,score=raters", "score='raters' reads more of the tokens in the cache"),
    ],
)
@torch.no_grad()
def test_schedules_that_a_later_image_does_not_go_with(
    compiled: Make, schedule: str, message: str
) -> None:
    model = compiled("llama", schedule)
    cache = read(model, [FIRST[0]]).past_key_values
    with pytest.raises(hidrop.InputError, match=rf"images came with a cache.*{message}"):
        read(model, [SECOND[0]], seed=1, cache=cache)


@torch.no_grad()
def test_models_and_calls_that_a_later_image_does_not_go_with(compiled: Make) -> None:
    model = compiled("mistral", SCHEDULE, sliding_window=20)
    cache = read(model, [FIRST[0]]).past_key_values
    with pytest.raises(hidrop.InputError, match=r"see 20 tokens back, and the conversation has"):
        read(model, [SECOND[0]], seed=1, cache=cache)
    model = compiled("llama", SCHEDULE)
    cache = read(model, [FIRST[0]]).past_key_values
    with (
        torch.enable_grad(),
        pytest.raises(hidrop.InputError, match=r"gradients are enabled.*torch.no_grad\(\)"),
    ):
        read(model, [SECOND[0]], seed=1, cache=cache)
