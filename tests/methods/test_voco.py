"""Text that sees images through a few tokens, held against VoCo-LLaMA's rule (facts in part B, section 4), written out.

Rows up to the last of those tokens are causal; those behind it see nothing before the first, and so need no key before it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import InputError, Schedule, ScheduleError
from tests.support.families import CASES
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import FIRST_WORD, IMAGE, IMAGE_TOKEN, batch, tiny_llava
from tests.support.reference import split_batch
from tests.support.runtimes import compiled_eagerly, last_layout

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

LAYERS, VOCO = 3, 90
ROWS: Any = [
    [5, 6, IMAGE, VOCO, VOCO, 7, 8, 9],
    [8, 9, IMAGE, 4, IMAGE, 3, VOCO, 3],
    [11, 12, 13],
    [IMAGE, 7, VOCO],
]
NAME = f"voco(token_id={VOCO})"
LATE = f"bottleneck={VOCO},inject=1,exit=2"
EACH = pytest.mark.parametrize("text", [NAME, LATE])
LONG = pytest.mark.parametrize("text", [pytest.param(NAME, marks=pytest.mark.slow), LATE])


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-b, a], dim=-1) * sin


def voco(
    model: Any,
    ids: Tensor,
    features: list[Tensor],
    inject: int = 0,
    exit: int = LAYERS,
    prompt: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits [n, vocabulary] of one row without pads; and which tokens those behind it see, bool [n].

    All tokens run through all layers under one mask, and nothing is cached: as the authors' code is right to be used.
    """
    n, columns = len(ids), torch.arange(len(ids))
    words = columns >= (n if prompt is None else prompt)  # whatever is generated is none of both
    places = (ids.eq(VOCO) & ~words).nonzero().flatten()
    is_image = ids.eq(model.config.image_token_id) & ~words
    seen = columns[None] <= columns[:, None]
    held = torch.ones(n, dtype=torch.bool)
    if len(places):
        behind = columns > places[-1]
        seen = seen & ((columns >= places[0])[None] | ~behind[:, None])
        held = columns >= places[0]
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(ids)
    if is_image.any():
        hidden = hidden.index_copy(0, is_image.nonzero()[:, 0], torch.cat(features))
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], columns[None]))
    for k, layer in enumerate(decoder.layers):
        there = ~is_image if not inject <= k < exit else torch.ones(n, dtype=torch.bool)
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        split = [
            projection(normed).view(n, -1, attention.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = rotated(split[0], cos, sin), rotated(split[1], cos, sin)
        groups = len(query) // len(key)
        key, value = key.repeat_interleave(groups, 0), split[2].repeat_interleave(groups, 0)
        logits = query @ key.transpose(1, 2) * attention.head_dim**-0.5
        weights = logits.masked_fill(~(seen & there[None]), float("-inf")).softmax(dim=-1)
        update = attention.o_proj((weights.nan_to_num() @ value).transpose(0, 1).flatten(1))
        new = hidden + update
        new = new + layer.mlp(layer.post_attention_layernorm(new))
        hidden = torch.where(there[:, None], new, hidden)
    return model.lm_head(decoder.norm(hidden)), held


def events(schedule: Schedule) -> dict[str, int]:
    return {"inject": schedule.inject, "exit": LAYERS if schedule.exit is None else schedule.exit}


def assert_generates(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], new: int = 4
) -> None:
    out = model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    layout, cache = last_layout(model), out.past_key_values
    given, width = events(schedule), inputs["input_ids"].shape[1]
    for b, row in enumerate(split_batch(model, inputs)):
        ids, expected = row.input_ids, []
        for step_logits in out.logits:
            logits, _ = voco(model, ids, row.features, **given, prompt=len(row.input_ids))
            expected.append(logits[-1])
            torch.testing.assert_close(step_logits[b], logits[-1], rtol=1e-4, atol=1e-4)
            ids = torch.cat([ids, logits[-1:].argmax(dim=-1)])
        assert out.sequences[b, width:].tolist() == ids[-new:].tolist()
        _, held = voco(model, row.input_ids, row.features, **given)
        image = row.input_ids.eq(model.config.image_token_id)
        for k, layer in enumerate(cache.layers):
            there = held if given["inject"] <= k < given["exit"] else held & ~image
            assert layout.counts[layer.segment][b] == int(there.sum())
            columns = cache.log.columns_of(layer.segment)[b]
            columns = columns[columns < cache.log.first_column[b]].tolist()
            assert columns == row.places[there].tolist()
            ids_of = layout.plan.layers[k].query
            assert int(cache.log.first_ids[ids_of][b]) == len(row.input_ids)


@pytest.mark.parametrize("padding", ["left", "right"])
@EACH
@torch.no_grad()
def test_generates_what_the_rule_generates(llava: Any, text: str, padding: Any) -> None:
    schedule, inputs = Schedule.parse(text, LAYERS), batch(llava, ROWS, padding=padding)
    rows = split_batch(llava, inputs)
    with compiled_eagerly(llava, schedule):
        assert_generates(llava, schedule, inputs)
        found = llava(**inputs).logits
        report = hidrop.compare(llava, **inputs)
    assert report.ok, str(report)
    for b, row in enumerate(rows):
        logits, _ = voco(llava, row.input_ids, row.features, **events(schedule))
        words = row.input_ids.ne(llava.config.image_token_id)
        torch.testing.assert_close(found[b, row.places][words], logits[words], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_any_schedule_and_batch(llava: Any) -> None:
    words = st.lists(st.integers(FIRST_WORD, VOCO - 1), min_size=1, max_size=4)
    row = st.tuples(words, st.integers(0, 2), words, st.integers(0, 3), words).map(
        lambda drawn: [*drawn[0], *[IMAGE] * drawn[1], *drawn[2], *[VOCO] * drawn[3], *drawn[4]]
    )

    @seed(5)
    @settings(max_examples=5, phases=(Phase.generate,))
    @given(
        st.sampled_from([(0, None), (0, 2), (1, None), (1, 2), (2, 3)]),
        st.lists(row, min_size=1, max_size=4),
        st.lists(row, min_size=1, max_size=4),
    )
    def run(layers: tuple[int, int | None], first: Any, second: Any) -> None:
        schedule = Schedule(bottleneck=VOCO, inject=layers[0], exit=layers[1])
        with compiled_eagerly(llava, schedule):
            assert_generates(llava, schedule, batch(llava, first, padding="left"), 3)
            assert_generates(llava, schedule, batch(llava, second, padding="right"), 3)

    run()


def labelled(model: Any) -> dict[str, Tensor]:
    inputs = batch(model, [ROWS[0] + [4, 5], ROWS[1] + [10], ROWS[2]])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-2] = -100
    return inputs


@LONG
def test_a_training_step_has_the_gradients_of_the_rule(text: str) -> None:
    model, schedule = tiny_llava("llama", num_layers=LAYERS, kv_heads=2), Schedule.parse(text)
    inputs = labelled(model)
    total, count = torch.zeros(()), 0
    for row in split_batch(model, inputs):
        assert row.labels is not None
        logits, _ = voco(model, row.input_ids, row.features, **events(schedule))
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], row.labels[1:], ignore_index=-100, reduction="sum"
        )
        count += int((row.labels[1:] != -100).sum())
    expected = total / count
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model.train(), schedule):
        loss, found = step(model, inputs)
        report = hidrop.compare(model, **inputs)
    assert report.ok, str(report)
    torch.testing.assert_close(loss, expected)
    assert_gradients_close(found, gradients)


@pytest.mark.slow
def test_aot_eager_agrees() -> None:
    model = tiny_llava("qwen3", num_layers=LAYERS, kv_heads=2)
    inputs, found = batch(model, ROWS), []
    for name in ("eager", "aot_eager"):
        hidrop.compile(model, LATE, backend=name)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append((ids.tolist(), *step(model.train(), labelled(model))))
        hidrop.restore(model.eval())
    (ids, loss, gradients), (other, other_loss, other_gradients) = found
    assert ids == other
    torch.testing.assert_close(loss, other_loss)
    assert_gradients_close(other_gradients, gradients)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_agrees(llava: Any) -> None:
    hidrop.compile(llava, LATE, backend="inductor")
    assert_generates(llava, Schedule.parse(LATE), batch(llava, ROWS))
    hidrop.restore(llava)


@pytest.mark.slow
@torch.no_grad()
def test_windows_and_blocks_are_narrowed_too() -> None:
    model = tiny_llava("mistral", num_layers=LAYERS, kv_heads=2, sliding_window=6)
    with compiled_eagerly(model, NAME):
        assert hidrop.compare(model, **batch(model, ROWS)).ok
    case = CASES["gemma3"]
    model = case.make()
    from tests.support.families import IMAGE as FAMILY_IMAGE
    from tests.support.families import make_batch

    given = make_batch(case, model, [[5, FAMILY_IMAGE, 7, 7, 8, 9], [4, 5, 6]]).inputs
    with compiled_eagerly(model, "bottleneck=7"):
        assert hidrop.compare(model, **given).ok


@LONG
@torch.no_grad()
def test_recorded_saved_and_replayed(llava: Any, text: str, tmp_path: Path) -> None:
    schedule, inputs = Schedule.parse(text, LAYERS), batch(llava, ROWS)
    hidrop.compile(llava, schedule, backend="eager", cuda_graphs=True, bucket_multiple=8)
    for rows in (ROWS, [ROWS[2], ROWS[0]], [ROWS[3]], [ROWS[2]], ROWS):
        assert_generates(llava, schedule, batch(llava, rows))
    hidrop.dump(llava, tmp_path / "dump")
    hidrop.save(llava, tmp_path)
    hidrop.restore(llava)
    replayed = hidrop.replay(tmp_path / "dump", llava, program="prefill-bottleneck", **inputs)
    assert replayed.ok, str(replayed)
    hidrop.load(llava, tmp_path, backend="eager")
    assert_generates(llava, schedule, inputs)
    hidrop.restore(llava)


@torch.no_grad()
def test_costs_are_those_of_what_is_cached(llava: Any) -> None:
    inputs = batch(llava, [ROWS[0]])
    with compiled_eagerly(llava, NAME):
        cache = llava(**inputs, use_cache=True).past_key_values
        report = hidrop.inspect(llava)
    assert [layer.filled for layer in cache.layers] == [5] * LAYERS
    assert [layer.kv_bytes for layer in report.layers] == [5 * 2 * 2 * 8 * 4] * LAYERS
    planned = hidrop.plan(
        "voco", num_layers=32, hidden_size=4096, intermediate_size=11008, vision_tokens=576
    )
    assert planned.vision_tokens == (576,) * 32
    assert planned.cached_tokens == (64,) * 32
    assert planned.kv_bytes == planned.identity.kv_bytes // 10


@torch.no_grad()
def test_an_image_without_such_tokens_is_told(llava: Any, caplog: Any) -> None:
    with compiled_eagerly(llava, NAME), caplog.at_level(logging.WARNING, "hidrop_fx"):
        llava(**batch(llava, [ROWS[2]]))
        assert "bottleneck" not in caplog.text
        llava(**batch(llava, [ROWS[0]]))
        assert "does nothing" not in caplog.text
        llava(**batch(llava, [[5, IMAGE, 7]]))
    assert f"no token {VOCO}, the bottleneck: all of their text sees the image" in caplog.text


@torch.no_grad()
def test_embeddings_do_not_tell_which_tokens_they_are(llava: Any) -> None:
    embeds = llava.get_input_embeddings()(torch.tensor([[5, VOCO, 7]]))
    with (
        compiled_eagerly(llava, NAME),
        pytest.raises(InputError, match=f"bottleneck={VOCO} is an id, .*pass input_ids"),
    ):
        llava(inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("voco(token_id=-1)", "bottleneck=-1 is too small"),
        ("voco(token_id='<voco>')", "bottleneck='<voco>' is a str"),
        ("voco(token_id=3.5)", "bottleneck=3.5 is a float"),
        ("voco(tokens=2)", "tokens.*write voco"),
        ("bottleneck=5,prune=2:3", r"prune={2: 3} beside bottleneck=5"),
        ("bottleneck=5,reads=0", r"reads=\(0,\) beside bottleneck=5"),
        ("bottleneck=5,cache=snapkv(window=2,capacity=9)", "cache=.snapkv.*beside bottleneck=5"),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (97, "bottleneck=97, but the model has 97 words, 0 to 96: .*resize_token_embeddings"),
        (IMAGE_TOKEN, f"bottleneck={IMAGE_TOKEN} is the placeholder of an image"),
    ],
)
def test_a_token_that_is_no_word_of_the_model_is_named(
    llava: Any, token: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        hidrop.compile(llava, Schedule(bottleneck=token))
