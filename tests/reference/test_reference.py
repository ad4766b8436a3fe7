"""The reference is right: HF itself for the identity, HF's own attention for the scores, arithmetic by hand for the rest.

Over 400 lines: it holds one file against three independent sources.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import (
    EOS,
    IMAGE,
    IMAGE_TOKEN,
    batch,
    random_labels,
    rows,
    schedules,
    tiny_llava,
)
from tests.support.reference import (
    IGNORE,
    Reference,
    keep_count,
    reference_generate,
    reference_generations,
    reference_logits,
    reference_rows,
    split_batch,
)

MODELS = [
    ("llama", None, None),
    ("llama", None, 2),
    ("mistral", None, 2),
    ("mistral", 6, 2),
    ("qwen2", None, None),
    ("qwen2", 6, 2),
    ("qwen3", None, 2),
    ("qwen3", 6, 1),
]
ROWS: list[list[int | str]] = [
    [5, 6, IMAGE, 7, IMAGE, 9],
    [8, IMAGE],
    [4, 5, 6, 7, 8, 9, 10, 11],
    [IMAGE, 5, 6, 7, 8, 9, 10, 11, IMAGE, IMAGE, 12, 13],
    [IMAGE],
]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def schedule(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"inject": 0, "prune": {}, "exit": None, "positions": "persistent"} | changes
    )


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: "-".join(str(x) for x in p))
def model(request: pytest.FixtureRequest) -> Any:
    backbone, window, kv_heads = request.param
    return tiny_llava(backbone, sliding_window=window, kv_heads=kv_heads)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llava("llama", kv_heads=2)


def only_row(model: Any, row: list[int | str]) -> tuple[Tensor, list[Tensor]]:
    (split,) = split_batch(model, batch(model, [row]))
    return split.input_ids, split.features


# The identity schedule is HF.


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_identity_logits_are_those_of_hf(model: Any, row: list[int | str]) -> None:
    inputs = batch(model, [row])
    torch.testing.assert_close(
        reference_logits(model, schedule(), inputs), model(**inputs).logits, **CLOSE
    )


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_identity_generates_what_hf_generates(model: Any, row: list[int | str]) -> None:
    inputs = batch(model, [row])
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
    generation = reference_generations(model, schedule(), inputs, 10)[0]
    assert min(generation.margins) > 1e-4
    assert generation.tokens == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_identity_generates_what_hf_generates_for_a_left_padded_batch(model: Any) -> None:
    inputs = batch(model, ROWS, padding="left", pad_to=50)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert reference_generate(model, schedule(), inputs, 6) == output[:, 50:].tolist()


def test_generation_ends_with_the_end_token(llama: Any) -> None:
    inputs = batch(llama, [ROWS[0]])
    endless = reference_generate(llama, schedule(), inputs, 8)[0]
    end = endless[3]
    first = endless.index(end)
    output = llama.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end)
    for eos in (end, [EOS + 1000, end]):
        assert reference_generate(llama, schedule(), inputs, 8, eos)[0] == endless[: first + 1]
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == endless[: first + 1]


def test_identity_gradients_are_those_of_hf(model: Any) -> None:
    inputs = batch(model, [ROWS[0]])
    labels = random_labels(inputs)
    gradients = []
    for logits in (
        model(**inputs).logits,
        reference_logits(model, schedule(), inputs | {"labels": labels}),
    ):
        loss = model.loss_function(logits, labels, vocab_size=logits.shape[-1])
        weights = [
            p for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "1.bias"))
        ]
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_hf() -> None:
    model = tiny_llava("qwen3", dtype=torch.bfloat16)
    inputs = batch(model, [ROWS[0]])
    with torch.no_grad():
        ours, theirs = reference_logits(model, schedule(), inputs), model(**inputs).logits
    assert ours.dtype == torch.bfloat16
    assert torch.nn.functional.mse_loss(ours.float(), theirs.float()) < 1e-3 * theirs.float().var()


# Scores and cuts.


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "kv_heads"), [("llama", 2), ("mistral", None), ("qwen2", 2), ("qwen3", 2)]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_score_is_the_attention_of_the_last_token(backbone: str, kv_heads: int, layer: int) -> None:
    model = tiny_llava(backbone, kv_heads=kv_heads, attn="eager")
    inputs = batch(model, [ROWS[0]])
    attention = model(**inputs, output_attentions=True).attentions[layer][0, :, -1].mean(0)
    vision = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten().tolist()
    best = sorted(vision, key=lambda c: -attention[c])

    (row,) = reference_rows(model, schedule(prune={layer: 3}), inputs)
    cut = row.cuts[layer]
    torch.testing.assert_close(cut.scores, attention[vision])
    assert cut.candidates == row.vision == vision
    assert row.kept == {layer: sorted(best[:6])}
    low, high = float(attention[best[5]]), float(attention[best[6]])
    assert cut.gap == row.gap == pytest.approx((low - high) / low, rel=1e-3)
    assert row.tokens == [22 if k < layer else 4 + 6 for k in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
def test_second_score_sees_the_ids_left_by_the_first_cut(backbone: str, positions: str) -> None:
    model: Any = tiny_llava(backbone, num_layers=2, kv_heads=2, attn="eager")
    ids, features = only_row(model, ROWS[0])
    plan = schedule(prune={0: 4, 1: 2}, positions=positions)
    row = Reference(model, plan).prefill(ids, features)
    # Layer 0 once more, without the second cut, for the states that the second cut sees.
    plan.prune.pop(1)
    before = Reference(model, plan).prefill(ids, features)
    columns = before.columns[0]
    assert columns == before.columns[1] != row.columns[1]

    states = model.model.language_model.embed_tokens(ids)
    states[ids == IMAGE_TOKEN] = torch.cat(features)
    layer = model.model.language_model.layers[1]
    rope = model.model.language_model.rotary_emb(states, torch.tensor([before.position_ids[1]]))
    hidden = model.model.language_model.layers[0](
        states[None, columns], attention_mask=_causal(len(columns)), position_embeddings=rope
    )
    _, weights = layer.self_attn(
        layer.input_layernorm(hidden),
        attention_mask=_causal(len(columns)),
        position_embeddings=rope,
    )
    at = [columns.index(c) for c in row.cuts[1].candidates]
    torch.testing.assert_close(row.scores[1], weights[0, :, -1, at].mean(0), **CLOSE)
    if positions == "compact":
        assert before.position_ids[1] == list(range(len(columns)))


def _causal(length: int) -> Tensor:
    return torch.full((1, 1, length, length), -math.inf).triu(1)


@torch.no_grad()
def test_score_ignores_the_sliding_window() -> None:
    windowed = tiny_llava("mistral", sliding_window=6)
    plain = tiny_llava("mistral", attn="eager")
    inputs = batch(windowed, [ROWS[0]])
    (row,) = reference_rows(windowed, schedule(prune={0: 1}), inputs)
    attention = plain(**inputs, output_attentions=True).attentions[0][0, :, -1].mean(0)
    torch.testing.assert_close(row.scores[0], attention[row.vision])


@torch.no_grad()
def test_training_scores_are_the_mean_over_the_answers() -> None:
    model = tiny_llava("llama", attn="eager")
    inputs = batch(model, [[IMAGE, 5, 6, 7, IMAGE, 8, 9, 10]])
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[0, 10:12] = 1  # columns 10 and 11: asked for by columns 9 and 10
    labels[0, 22:] = 1  # columns 22 and 23: asked for by columns 21 and 22
    (row,) = reference_rows(model, schedule(prune={1: 4}), inputs | {"labels": labels})
    assert row.queries == [9, 21]
    attention = model(**inputs, output_attentions=True).attentions[1][0, :, [9, 21]].mean((0, 1))
    torch.testing.assert_close(row.scores[1], attention[row.vision])


def test_without_an_answer_the_last_column_is_the_query(llama: Any) -> None:
    ids, features = only_row(llama, [5, IMAGE, 6])
    for labels in (torch.full_like(ids, IGNORE), torch.ones_like(ids)):
        assert Reference(llama, schedule()).prefill(ids, features, labels).queries == [10]


def test_columns_behind_every_query_tie_without_ambiguity(llama: Any) -> None:
    ids, features = only_row(llama, [5, 6, 7, IMAGE, 8])
    labels = torch.full_like(ids, IGNORE)
    labels[1] = 1
    row = Reference(llama, schedule(prune={1: 4})).prefill(ids, features, labels)
    assert row.scores[1].tolist() == [0.0] * 9
    assert row.kept == {1: [3, 4, 5, 6]}
    assert row.gap == math.inf


def test_equal_scores_keep_the_lower_columns_and_say_so() -> None:
    model: Any = tiny_llava("llama")
    model.model.language_model.layers[1].self_attn.q_proj.weight.data.zero_()
    (row,) = reference_rows(model, schedule(prune={1: 2}), batch(model, [ROWS[0]]))
    assert row.kept == {1: [2, 3, 4, 5]}
    assert row.gap == 0.0


@pytest.mark.parametrize(
    ("keep", "images", "vision", "alive", "expected"),
    [
        (3, 2, 18, 18, 6),
        (3, 2, 18, 5, 5),
        (100, 1, 9, 9, 9),
        (0.5, 1, 9, 9, 5),
        (
            0.35,
            1,
            10,
            10,
            4,
        ),  # 3.5
        (0.145, 1, 100, 100, 15),  # 14.5, of which binary arithmetic makes 14.499...
        (0.25, 2, 18, 4, 4),
        (0.01, 1, 9, 9, 1),
        (1.0, 1, 9, 9, 9),
        (0.5, 1, 0, 0, 0),
    ],
)
def test_keep_count_rounds_half_up_and_keeps_one(
    keep: float, images: int, vision: int, alive: int, expected: int
) -> None:
    assert keep_count(keep, images, vision, alive) == expected


# Streams and segments.


def test_reference_rows_have_the_tokens_of_the_schedule(llama: Any) -> None:
    plan = schedule(inject=1, prune={1: 4, 2: 0.25}, exit=3)
    short, image_last, words = reference_rows(llama, plan, batch(llama, ROWS[:3]))
    assert short.tokens == [4, 4 + 8, 4 + 5, 4]  # 0.25 * 18 = 4.5, up
    assert image_last.text == [0, 9]
    assert image_last.vision == list(range(1, 9))
    assert image_last.tokens == [2, 2 + 4, 2 + 2, 2]
    assert words.tokens == [8] * 4
    assert words.cuts == {}
    assert short.columns[0] == short.columns[3] == [0, 1, 11, 21]
    assert short.hidden.shape == (4, 32)
    assert short.kv_lengths == short.tokens


def test_supervised_placeholders_belong_to_the_text_stream(llama: Any) -> None:
    ids, features = only_row(llama, [5, IMAGE, 6, 7])
    labels = torch.full_like(ids, IGNORE)
    labels[10:] = ids[10:]
    row = Reference(llama, schedule(inject=2, exit=3)).prefill(ids, features, labels)
    assert row.text == [0, 9, 10, 11]
    assert row.queries == [9]
    assert row.tokens == [4, 4, 12, 4]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
def test_segments_are_hf_layers_on_fewer_tokens(model: Any, positions: str) -> None:
    """HF's layers, each called with the rows, ids and mask worked out here."""
    inputs = batch(model, [ROWS[3]])
    plan = schedule(inject=1, prune={2: 3}, exit=3, positions=positions)
    (row,) = reference_rows(model, plan, inputs)
    (split,) = split_batch(model, inputs)
    decoder = model.model.language_model
    states = decoder.embed_tokens(split.input_ids)
    states[split.input_ids == IMAGE_TOKEN] = torch.cat(split.features)

    text = [c for c in range(36) if split.input_ids[c] != IMAGE_TOKEN]
    kept = sorted(text + row.kept[2])
    late = {c: i for i, c in enumerate(text)} if positions == "group" else {}
    for k, columns in enumerate([text, list(range(36)), kept, text]):
        ids = [late.get(c, c) for c in columns]
        if positions == "compact" and k >= 2:
            ids = list(range(len(columns)))
        at = torch.tensor(columns)
        window = getattr(model.config.text_config, "sliding_window", None)
        kinds = getattr(model.config.text_config, "layer_types", None)
        if kinds is not None and kinds[k] == "full_attention":
            window = None
        distance = at[:, None] - at[None, :]
        visible = (distance >= 0) & (distance < (window or 1000))
        states[at] = decoder.layers[k](
            states[None, at],
            attention_mask=visible[None, None],
            position_embeddings=decoder.rotary_emb(states, torch.tensor([ids])),
        )[0]
    assert row.columns == [text, list(range(36)), kept, text]
    torch.testing.assert_close(row.hidden, decoder.norm(states[text]), **CLOSE)


def test_exit_after_the_last_layer_changes_nothing(llama: Any) -> None:
    inputs = batch(llama, [ROWS[0]])
    never, last = (reference_rows(llama, schedule(exit=e), inputs)[0] for e in (None, 4))
    assert never.columns == last.columns
    assert torch.equal(never.logits, last.logits)


# Positions.


def test_persistent_ids_are_columns(llama: Any) -> None:
    plan = schedule(inject=1, prune={2: 2}, exit=3)
    (generation,) = reference_generations(llama, plan, batch(llama, [ROWS[0]]), 3)
    assert generation.prompt.position_ids == generation.prompt.columns
    assert [cache.ids[-2:] for cache in generation.prompt.caches] == [[22, 23]] * 4


def test_compact_ids_count_the_survivors(llama: Any) -> None:
    plan = schedule(inject=1, prune={2: 2}, exit=3, positions="compact")
    (generation,) = reference_generations(llama, plan, batch(llama, [ROWS[0]]), 3)
    row = generation.prompt
    assert row.position_ids == [[0, 1, 11, 21], list(range(22)), list(range(8)), list(range(4))]
    assert [cache.ids[-2:] for cache in row.caches] == [[22, 23], [22, 23], [8, 9], [4, 5]]
    assert [cache.columns[-2:] for cache in row.caches] == [[22, 23]] * 4
    assert row.kv_lengths == [6, 24, 10, 6]


def test_group_ids_number_text_as_if_without_images(llama: Any) -> None:
    plan = schedule(inject=1, prune={2: 2}, exit=3, positions="group")
    (generation,) = reference_generations(llama, plan, batch(llama, [ROWS[0]]), 3)
    row = generation.prompt
    mixed = [0, 1, *range(2, 11), 2, *range(12, 21), 3]
    assert row.position_ids[0] == row.position_ids[3] == [0, 1, 2, 3]
    assert row.position_ids[1] == mixed
    assert row.position_ids[2] == [mixed[c] for c in row.columns[2]]
    assert [cache.ids[-2:] for cache in row.caches] == [[4, 5]] * 4


# Batches and decode.


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(llama: Any, padding: Any) -> None:
    plan = schedule(inject=1, prune={2: 0.5}, exit=3)
    inputs = batch(llama, ROWS, padding=padding, pad_to=40)
    logits = reference_logits(llama, plan, inputs)
    mask = inputs["attention_mask"].bool()
    assert logits.shape == (5, 40, 97)
    assert not logits[~mask].any()
    first = 0
    for b, row in enumerate(ROWS):
        single = batch(llama, [row])
        images = row.count(IMAGE)
        if images:
            single["pixel_values"] = inputs["pixel_values"][first : first + images]
        first += images
        alone = reference_logits(llama, plan, single)[0]
        torch.testing.assert_close(logits[b, mask[b]], alone, **CLOSE)
        is_text = single["input_ids"][0] != IMAGE_TOKEN
        is_text[-1] = True
        assert (alone != 0).any(-1).tolist() == is_text.tolist()


@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
def test_decode_is_prefill_of_the_longer_row(model: Any, positions: str) -> None:
    """True as long as nothing is pruned: another last token would choose other tokens."""
    plan = schedule(inject=1, exit=3, positions=positions)
    inputs = batch(model, [ROWS[0]])
    generation = reference_generations(model, plan, inputs, 6)[0]
    assert min(generation.margins) > 1e-4
    ids = inputs["input_ids"]
    with torch.no_grad():
        for token in generation.tokens:
            logits = reference_logits(
                model, plan, inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
            assert int(logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_images_that_do_not_match_placeholders_are_refused(llama: Any) -> None:
    inputs = batch(llama, [ROWS[0]])
    with pytest.raises(ValueError, match="18 image placeholders"):
        reference_logits(llama, schedule(), inputs | {"pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="2 images belong to no row"):
        reference_logits(
            llama, schedule(), inputs | {"input_ids": inputs["input_ids"].clamp(max=9)}
        )


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_schedule_runs_on_any_batch(llama: Any, data: st.DataObject) -> None:
    plan = SimpleNamespace(**data.draw(schedules(4)))
    inputs = batch(llama, data.draw(rows()), padding=data.draw(st.sampled_from(["left", "right"])))
    with_labels = data.draw(st.booleans())
    if with_labels:
        inputs["labels"] = random_labels(inputs, seed=data.draw(st.integers(0, 9)))
    with torch.no_grad():
        results = reference_rows(llama, plan, inputs)
    for row in results:
        assert sorted(row.text + row.vision) == list(range(row.length))
        assert set(row.queries) <= set(row.text)
        for k, columns in enumerate(row.columns):
            alive = set(columns) - set(row.text)
            assert columns == sorted(columns)
            assert set(row.text) <= set(columns)
            outside = k < plan.inject or (plan.exit is not None and k >= plan.exit)
            assert bool(alive) == (bool(row.vision) and not outside)
            if plan.positions == "compact" and row.vision and any(p <= k for p in plan.prune):
                assert row.position_ids[k] == list(range(len(columns)))
        for k, cut in row.cuts.items():
            assert set(cut.kept) == set(row.columns[k]) - set(row.text)
            assert cut.gap >= 0
