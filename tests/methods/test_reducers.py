"""The stage before the decoder: what each method keeps, held against its authors' rule, and what the decoder sees of it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import hidrop_fx as hidrop
from hidrop_fx import HidropError, InputError, PassError, Schedule, ScheduleError, register_reducer
from hidrop_fx.methods.reducers import REDUCERS, reduction
from hidrop_fx.ops.reduction import TowerTokens
from tests.support.gradients import assert_gradients_close
from tests.support.models import IMAGE, IMAGE_TOKEN, batch, tiny_llava
from tests.support.prompts import CLOSE
from tests.support.reference import Reference, RowResult, split_batch
from tests.support.runtimes import compiled_eagerly, runtime_in
from tests.support.sharded import one_process
from tests.support.towers import sized_batch, tiny_tower

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]
LAYERS, TOKENS = 4, 16
SMALL = {
    "divprune": "divprune(ratio=0.3)",
    "cdpruner": "cdpruner(tokens=6,relevance=0.5)",
    "pooling": "pooling(tokens=9)",
    "visionzip": "visionzip(dominant=4,contextual=3)",
}
each_reducer = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS)


# The rules, written out one image and one token at a time.


def div_prune(features: Tensor, count: int) -> list[int]:
    def distance(i: int, j: int) -> float:
        a, b = features[i].double(), features[j].double()
        return 1 - float(a @ b / (a.norm() * b.norm()))

    places = range(len(features))
    chosen = [max(places, key=lambda i: min(distance(i, j) for j in places if j != i))]
    while len(chosen) < count:
        left = [i for i in places if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in chosen)))
    return sorted(chosen)


def cd_pruner(features: Tensor, text: Tensor, count: int, weight: float) -> list[int]:
    """Greedy MAP: each step takes the token that makes the determinant of the chosen kernel largest."""
    unit = features.double() / features.double().norm(dim=-1, keepdim=True)
    words = text.double() / text.double().norm(dim=-1, keepdim=True)
    r = (unit @ words.T).mean(dim=1)
    r = (r - r.min()) / (r.max() - r.min() + 1e-6)
    quality = torch.exp(weight / (2 * (1 - weight)) * r)
    kernel = quality[:, None] * (unit @ unit.T) * quality[None]
    chosen: list[int] = []
    while len(chosen) < count:
        left = [i for i in range(len(features)) if i not in chosen]
        gains = [float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in left]
        chosen.append(left[gains.index(max(gains))])
    return sorted(chosen)


def average_pool(features: Tensor, side: int) -> Tensor:
    """For sides that divide the grid, and for others by torch's rule of overlapping cells."""
    n = math.isqrt(len(features))
    grid = features.view(n, n, -1)
    rows = []
    for i in range(side):
        for j in range(side):
            a, b = i * n // side, -(-(i + 1) * n // side)
            c, d = j * n // side, -(-(j + 1) * n // side)
            rows.append(grid[a:b, c:d].flatten(0, 1).mean(dim=0))
    return torch.stack(rows)


def vision_zip(model: Any, pixels: Tensor, dominant: int, contextual: int) -> Tensor:
    """From the attention weights and keys of the tower's layer -2, for one image [1, 3, H, W]."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    keys: list[Tensor] = []
    layer = tower.encoder.layers[-2].self_attn
    hook = layer.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    tower.set_attn_implementation("eager")
    try:
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        hook.remove()
        tower.set_attn_implementation(before)
    hidden = out.hidden_states[-2][0]
    received = out.attentions[-2][0][:, 0, 1:].sum(dim=0)
    chosen = sorted((received.topk(dominant - 1).indices + 1).tolist())
    heads = layer.num_heads
    metric = keys[0][0].view(len(hidden), heads, -1).mean(dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    rest = [i for i in range(1, len(hidden)) if i not in chosen]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            near = [float(metric[i] @ metric[t]) for t in targets]
            members[targets[near.index(max(near))]].append(i)
    rows = [hidden[0], *(hidden[i] for i in chosen)]
    for target in targets:
        mean = (
            hidden[members[target]].mean(dim=0) if members[target] else torch.zeros_like(hidden[0])
        )
        rows.append(hidden[target] + mean)
    return model.model.multi_modal_projector(torch.stack(rows)[None])[0]


def vision_zip_without_class(model: Any, pixels: Tensor, dominant: int, contextual: int) -> Tensor:
    """From the last layer of a tower of patches alone, for one image: what all patches pay to each decides."""
    tower = model.model.vision_tower
    layer = tower.encoder.layers[-1].self_attn
    keys: list[Tensor] = []
    hook = layer.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    tower.set_attn_implementation("eager")
    try:
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        hook.remove()
        tower.set_attn_implementation("sdpa")
    hidden, paid = out.hidden_states[-1][0], out.attentions[-1][0]
    received = [float(paid[:, :, j].sum()) for j in range(len(hidden))]
    chosen = sorted(sorted(range(len(hidden)), key=lambda j: -received[j])[:dominant])
    metric = keys[0][0].view(len(hidden), layer.num_heads, -1).mean(dim=1)
    rest = [j for j in range(len(hidden)) if j not in chosen]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    rows = [hidden[j] for j in chosen]
    for target in targets:
        members = [
            hidden[j]
            for j in rest
            if j not in targets
            and target
            == max(targets, key=lambda t: float(cosine_similarity(metric[j], metric[t], dim=0)))
        ]
        mean = torch.stack(members).mean(dim=0) if members else torch.zeros_like(hidden[0])
        rows.append(hidden[target] + mean)
    return model.model.multi_modal_projector(torch.stack(rows)[None])[0]


def shortened(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor]
) -> list[tuple[Tensor, list[Tensor], Tensor | None, Tensor]]:
    """Each row as its authors' code hands it to the decoder: ids with fewer placeholders, features, labels, places."""
    name, arguments = (
        reduction(str(schedule.before)).reducer.name,
        dict(reduction(str(schedule.before)).arguments),
    )
    pixels = inputs["pixel_values"]
    image, found = 0, []
    for row in split_batch(model, inputs):
        words = row.input_ids != IMAGE_TOKEN
        if row.labels is not None:
            words &= row.labels == -100
        text = model.get_input_embeddings()(row.input_ids[words])
        ids, labels, places = [], [], []
        features: list[Tensor] = []
        offset = 0
        starts = iter(row.features)
        current: list[int] = []
        for column, token in enumerate(row.input_ids.tolist()):
            if token != IMAGE_TOKEN:
                stay = True
            else:
                if offset % TOKENS == 0:
                    given = next(starts)
                    kept, rows = _kept(
                        model, name, arguments, given, text, pixels[image : image + 1]
                    )
                    current, image = kept, image + 1
                    features.append(rows)
                stay = offset % TOKENS in current
                offset += 1
            if stay:
                ids.append(token)
                places.append(column)
                if row.labels is not None:
                    labels.append(int(row.labels[column]))
        found.append(
            (
                torch.tensor(ids),
                features,
                None if row.labels is None else torch.tensor(labels),
                row.places[places],
            )
        )
    return found


def _kept(
    model: Any, name: str, arguments: dict[str, Any], given: Tensor, text: Tensor, pixels: Tensor
) -> tuple[list[int], Tensor]:
    if name == "divprune":
        places = div_prune(given, round(len(given) * arguments["ratio"]))
        return places, given[places]
    if name == "cdpruner":
        places = cd_pruner(given, text, arguments["tokens"], arguments["relevance"])
        return places, given[places]
    if name == "pooling":
        rows = average_pool(given, math.isqrt(arguments["tokens"]))
        n, side = math.isqrt(len(given)), math.isqrt(len(rows))
        middle = [(2 * i + 1) * n // (2 * side) for i in range(side)]
        return [a * n + b for a in middle for b in middle], rows
    rows = vision_zip(model, pixels, arguments["dominant"], arguments["contextual"])
    return list(range(len(rows))), rows


def expected_rows(model: Any, schedule: Schedule, inputs: dict[str, Tensor]) -> list[RowResult]:
    after = Schedule.parse(
        str(schedule).replace(f"before={schedule.before}", "").strip(",") or "identity"
    )
    reference = Reference(model, after)
    return [
        reference.prefill(ids, features, labels)
        for ids, features, labels, _ in shortened(model, schedule, inputs)
    ]


def schedule_of(name: str, rest: str = "positions=compact") -> Schedule:
    return Schedule.parse(f"before={SMALL[name]},{rest}")


@each_reducer
def test_every_reducer_is_tried_here(name: str) -> None:
    others = {
        "density_peaks",
        "foreground",
    }  # for Qwen's models: `test_ppe`, `test_index_preserving`
    assert set(SMALL) == set(REDUCERS) - others


EVENTS = (
    "positions=compact",
    "inject=1,prune=2:0.5,exit=3,positions=compact",
    "prune=1:3+2:0.25,positions=compact",
)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rest", EVENTS)
@each_reducer
@torch.no_grad()
def test_the_decoder_sees_what_the_authors_hand_it(
    name: str, rest: str, padding: Any, llava: Any
) -> None:
    """Logits of the shortened prompt, and the tokens that follow it."""
    schedule = schedule_of(name, rest)
    inputs = batch(llava, ROWS, padding=padding)
    short = shortened(llava, schedule, inputs)
    after = Schedule.parse(rest)
    reference = Reference(llava, after)
    tokens = [reference.generate(ids, features, 5) for ids, features, *_ in short]
    rows = [reference.prefill(ids, features) for ids, features, *_ in short]
    with compiled_eagerly(llava, schedule):
        output = llava(**inputs)
        for b, (row, (*_, places)) in enumerate(zip(rows, short, strict=True)):
            where = places[row.surviving]
            torch.testing.assert_close(output.logits[b, where], row.logits, **CLOSE)
            others = torch.ones(output.logits.shape[1], dtype=torch.bool)
            others[where] = False
            assert not output.logits[b, others].any()
        layout = runtime_in(llava).last_layout
        assert layout is not None
        seen = [layer.query for layer in layout.plan.layers]
        assert [layout.counts[s] for s in seen] == [
            list(each) for each in zip(*(row.tokens for row in rows), strict=True)
        ]
        found = llava.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == tokens


@each_reducer
def test_a_training_step_has_the_gradients_of_the_shortened_prompt(name: str) -> None:
    model = tiny_llava("llama", num_layers=LAYERS, image_tokens=TOKENS).train()
    twin = tiny_llava("llama", num_layers=LAYERS, image_tokens=TOKENS).train()
    schedule = schedule_of(name)
    inputs = batch(model, ROWS[:2], padding="right")
    # No answer follows an image, whose last token would stay for it.
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    for row, places in enumerate(inputs["attention_mask"].bool()):
        inputs["labels"][row, places.nonzero()[-1]] = 9
    rows = expected_rows(twin, schedule, inputs)
    losses, count = [], 0
    for row, (_, _, labels, _) in zip(rows, shortened(twin, schedule, inputs), strict=True):
        assert labels is not None
        logged = row.logits.log_softmax(-1)
        at = {column: i for i, column in enumerate(row.surviving)}
        for i in range(len(labels) - 1):
            if labels[i + 1] != -100:
                losses.append(-logged[at[i], labels[i + 1]])
                count += 1
    expected = torch.stack(losses).sum() / count
    expected.backward()
    hidrop.compile(model, schedule, backend="eager")
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    others = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    # A bias of all keys moves no softmax: its gradient is rounding.
    biases = {name for name in others if name.endswith("k_proj.bias")}
    assert_gradients_close(
        {name: g for name, g in found.items() if name not in biases},
        {name: g for name, g in others.items() if name not in biases},
    )


@each_reducer
@torch.no_grad()
def test_original_ids_stay_where_the_schedule_keeps_them(name: str, llava: Any) -> None:
    """What is kept is kept at its own place: the layout's ids are HF's, and decoding goes on with HF's next."""
    inputs = batch(llava, ROWS, padding="left")
    with compiled_eagerly(llava, schedule_of(name, "positions=persistent")):
        output = llava(**inputs, use_cache=True)
        layout = runtime_in(llava).last_layout
        assert layout is not None
        length = inputs["input_ids"].shape[1]
        assert layout.position_ids[:, :length].tolist() == [list(range(length))] * len(ROWS)
        log = output.past_key_values.log
        assert log.next_ids("text").tolist() == [length] * len(ROWS)
        assert log.length == length


@torch.no_grad()
def test_a_tower_is_read_while_fsdp2_has_it_gathered(llava: Any) -> None:
    """In a process by itself: behind the call of a layer its parameters are DTensors there, too."""
    inputs = batch(llava, ROWS)
    schedule = schedule_of("visionzip")
    with compiled_eagerly(llava, schedule):
        expected = llava(**inputs).logits
    model = tiny_llava("llama", num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS)
    hidrop.compile(model, schedule, backend="eager")
    with one_process("data") as mesh:
        found = hidrop.fully_shard(model, mesh)(**inputs).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_an_image_at_the_end_keeps_its_last_token(llava: Any) -> None:
    """Its output is asked for, so it stays as it was, beside those that are chosen."""
    inputs = batch(llava, [[5, IMAGE]])
    schedule = schedule_of("divprune")
    with compiled_eagerly(llava, schedule):
        llava(**inputs)
        layout = runtime_in(llava).last_layout
        assert layout is not None
    assert layout.last == [TOKENS]
    kept = div_prune(split_batch(llava, inputs)[0].features[0], round(TOKENS * 0.3))
    assert layout.counts["text"] == [2]
    assert layout.vision_counts["inject_0"] == [len(set(kept) - {TOKENS - 1})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("before=nobody()", "unknown before='nobody': choose one of divprune"),
        ("before=divprune(share=0.1)", "divprune takes ratio, not share"),
        ("divprune(ratio=2)", r"ratio=2 is not a share of the tokens"),
        ("divprune(ratio='x')", r"ratio='x' is not a share"),
        ("cdpruner(keep=0)", "tokens=0 is not a number of tokens"),
        ("cdpruner(relevance=1.0)", "relevance=1.0 is not a weight"),
        ("pooling(keep=-4)", "tokens=-4 is not a number of tokens"),
        ("visionzip(dominant=0)", "dominant=0 is not a number of tokens"),
        ("before=divprune(0.1)", "cannot read '0.1'"),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_an_image_smaller_than_what_is_kept_is_refused_by_name(llava: Any) -> None:
    with (
        compiled_eagerly(llava, Schedule.preset("visionzip")),
        pytest.raises(
            InputError, match="dominant=54 and contextual=10 are more than the 16 tokens"
        ),
    ):
        llava(**batch(llava, ROWS))


def test_features_made_before_are_refused_where_the_tower_is_read(llava: Any) -> None:
    inputs = batch(llava, ROWS[:1])
    output = llava.model.get_image_features(
        pixel_values=inputs.pop("pixel_values"), return_dict=True
    )
    with (
        compiled_eagerly(llava, schedule_of("visionzip")),
        pytest.raises(
            InputError, match="needs the pixels of the call, since it reads the vision tower"
        ),
    ):
        llava(**inputs, mm_encoder_outputs={"image": output})


@each_reducer
@torch.no_grad()
def test_answers_in_number_come_from_the_images_of_their_row(name: str, llava: Any) -> None:
    """Each row twice: generate repeats images, or their features, in one order or another."""
    inputs = batch(llava, ROWS, padding="left")
    given = {"max_new_tokens": 4, "eos_token_id": None, "num_beams": 2}
    schedule = schedule_of(name)
    with compiled_eagerly(llava, schedule):
        together = llava.generate(**inputs, **given, num_return_sequences=2)
        alone, pixels = [], inputs["pixel_values"]
        for row in ROWS:
            single, images = batch(llava, [row]), row.count(IMAGE)
            if images:
                single["pixel_values"], pixels = pixels[:images], pixels[images:]
            found = llava.generate(**single, **given, num_return_sequences=2)
            alone += found[:, -4:].tolist()
    assert together[:, -4:].tolist() == alone


@torch.no_grad()
def test_a_tower_without_a_class_token_is_asked_for_the_attention_received(caplog: Any) -> None:
    model = tiny_tower("siglip")
    inputs = sized_batch(model, [[5, 6, (3, 3), 7, 8]], tokens=9)
    rows = vision_zip_without_class(model, inputs["pixel_values"], 4, 2)
    ids = torch.tensor([5, 6, *[IMAGE_TOKEN] * 6, 7, 8])
    expected = Reference(model, Schedule()).prefill(ids, [rows])
    schedule = "visionzip(dominant=4,contextual=2)"
    with caplog.at_level("INFO", "hidrop_fx"), compiled_eagerly(model, schedule):
        found = [model(**inputs).logits[0, [*range(8), 11, 12]] for _ in range(2)]
    torch.testing.assert_close(found[0], expected.logits, **CLOSE)
    assert torch.equal(*found)
    said = [r.message for r in caplog.records if "no class token beside an image's 9" in r.message]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "visionzip"])
def test_autocast_changes_no_choice(name: str) -> None:
    """Tokens lie closer to each other than bf16 tells apart."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 32, generator=draw) + 4 * torch.randn(32, generator=draw)
    whole = torch.randint(0, 4, (2, 64, 8), generator=draw).float()  # sums that bf16 holds
    tower = TowerTokens(whole, None, torch.rand(2, 64, generator=draw), features)
    given = {
        "cdpruner": {"text": torch.randn(2, 32, generator=draw)},
        "visionzip": {"tower": tower},
    }
    run = partial(REDUCERS[name].function, features, 24, **given.get(name, {}))
    run = partial(run, dominant=16, contextual=8) if name == "visionzip" else run
    places, rows = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast, rows_cast = run()
    assert torch.equal(cast, places)
    if rows is not None:
        torch.testing.assert_close(rows_cast, rows, rtol=0, atol=2**-5)


def test_tiles_and_frames_are_not_counted_behind_a_reducer() -> None:
    with pytest.raises(ScheduleError, match="per='frame' counts frames, which before="):
        Schedule(before="divprune(ratio=0.5)", per="frame")


@each_reducer
def test_costs_count_what_reaches_the_decoder(name: str) -> None:
    costs = hidrop.plan(
        schedule_of(name), num_layers=4, hidden_size=64, intermediate_size=128,
        vision_tokens=2 * TOKENS, images=2,
    )  # fmt: skip
    each = {"divprune": 5, "cdpruner": 6, "pooling": 9, "visionzip": 7}[name]
    assert costs.vision_tokens == (2 * each,) * 4
    assert costs.total_vision_tokens == 2 * TOKENS
    assert costs.identity.vision_tokens == (2 * TOKENS,) * 4


def test_images_may_be_larger_than_llava_s() -> None:
    assert Schedule.preset("visionzip", dominant=600).entering_tokens(2304) == 610


def test_duet_is_visionzip_with_events() -> None:
    schedule = Schedule.preset("duet", dominant=4, contextual=3, layer=2, keep=3, exit=3)
    assert schedule == Schedule(
        before="visionzip(dominant=4,contextual=3)", positions="compact", prune={2: 3}, exit=3
    )


# What other tools say of it.


@each_reducer
@torch.no_grad()
def test_reports_count_what_was_there_and_what_is_left(name: str, llava: Any) -> None:
    schedule = schedule_of(name, "inject=1,prune=2:0.5,exit=3,positions=compact")
    inputs = batch(llava, ROWS, padding="left")
    each = {"divprune": 5, "cdpruner": 6, "pooling": 9, "visionzip": 7}[name]
    half = (each + 1) // 2, each
    text = 4, 5, 2
    tokens = sum(4 * t for t in text) + 3 * each + sum(half)
    whole = sum(4 * t for t in text) + 4 * 3 * TOKENS
    with compiled_eagerly(llava, schedule):
        explained = hidrop.explain(llava, **inputs)
        llava(**inputs)
        inspected = hidrop.inspect(llava)
    assert [row.vision_tokens for row in explained.rows] == [each, 2 * each, 0]
    assert [row.removed for row in explained.rows] == [TOKENS - each, 2 * (TOKENS - each), 0]
    assert f"takes {TOKENS - each}+{2 * (TOKENS - each)}+0 vision tokens out" in str(explained)
    assert inspected.vision_tokens == (TOKENS, 2 * TOKENS, 0)
    assert inspected.totals.token_layers == tokens
    assert inspected.identity.token_layers == whole
    assert explained.flops == inspected.totals.flops
    assert explained.identity_flops == inspected.identity.flops


@each_reducer
@torch.no_grad()
def test_it_is_warmed_up_dumped_and_replayed(name: str, tmp_path: Path) -> None:
    model = tiny_llava("llama", num_layers=LAYERS, image_tokens=TOKENS)
    hidrop.compile(model, schedule_of(name, EVENTS[1]), backend="eager")
    hidrop.warmup(model, [hidrop.Shape(batch=2, text=4, images=1)])
    inputs = batch(model, ROWS)
    model(**inputs)
    hidrop.dump(model, tmp_path)
    replayed = hidrop.replay(tmp_path, model, **inputs)
    assert replayed.ok, str(replayed)


@pytest.mark.parametrize("text", ["visionzip", "before=pooling(tokens=9)"])
def test_costs_of_images_that_cannot_be_reduced_are_refused(text: str) -> None:
    with pytest.raises(
        ScheduleError, match=r"before=.*(more than the 17 tokens|is no square grid)"
    ):
        hidrop.plan(text, num_layers=20, hidden_size=64, intermediate_size=128, vision_tokens=17)


# The rules at their edges.


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_equal_tokens_are_chosen_once_each(name: str) -> None:
    found = reduction(SMALL[name])
    features = torch.ones(2, 64, 8)
    arguments = dict(found.arguments)
    if "text" in found.reducer.needs:
        arguments |= {"text": torch.ones(2, 8), "relevance": 0.9}
    places, _ = found.reducer.function(features, 40, **arguments)
    assert (places.diff(dim=1) > 0).all()


def test_relevance_is_to_the_prompt_and_not_to_its_answer() -> None:
    model = tiny_llava("llama", num_layers=LAYERS, image_tokens=TOKENS).train()
    hidrop.compile(model, schedule_of("cdpruner"), backend="eager")
    seen = []
    for answer in (20, 41, 77):
        inputs = batch(model, [[5, IMAGE, 7, 8, answer]])
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        inputs["labels"][:, -1] = answer
        model(**inputs)
        layout = runtime_in(model).last_layout
        assert layout is not None
        seen.append(layout.vision_columns.tolist())
    assert seen[0] == seen[1] == seen[2]


@torch.no_grad()
def test_relevance_is_to_given_features_where_they_are_given(llava: Any) -> None:
    inputs = batch(llava, ROWS, padding="left")
    text = torch.randn(3, llava.config.text_config.hidden_size, generator=torch.Generator())
    rows = [row.features for row in split_batch(llava, inputs)]
    kept = [[cd_pruner(f, text[b : b + 1], 6, 0.9) for f in row] for b, row in enumerate(rows)]
    wanted = [[i * TOKENS + p for i, own in enumerate(row) for p in own] for row in kept]
    places = [(inputs["input_ids"][b] == IMAGE_TOKEN).nonzero().flatten() for b in range(3)]
    seen = []
    with compiled_eagerly(llava, "cdpruner(keep=6,relevance=0.9)"):
        plain = llava.generate(**inputs, max_new_tokens=4, eos_token_id=None)
        for given, copies in ((text, 1), (text, 2), (text[0], 1)):
            with hidrop.relevant_to(llava, given):
                llava.generate(**inputs, max_new_tokens=1, num_beams=copies)
            layout = runtime_in(llava).last_layout
            assert layout is not None
            length = inputs["input_ids"].shape[1]
            seen.append([[c for c in row if c < length] for row in layout.vision_columns.tolist()])
        again = llava.generate(**inputs, max_new_tokens=4, eos_token_id=None)
    by_rows = [places[b][wanted[b]].tolist() for b in range(3)]
    assert seen[0] == by_rows
    assert seen[1] == [row for row in by_rows for _ in range(2)]
    assert seen[2][0] == by_rows[0]
    assert seen[2][1] != by_rows[1]
    assert torch.equal(plain, again)


def test_text_features_that_do_not_fit_are_named(llava: Any) -> None:
    width = llava.config.text_config.hidden_size
    with pytest.raises(HidropError, match="is not compiled"), hidrop.relevant_to(llava, ROWS[0]):
        pass
    with compiled_eagerly(llava, "cdpruner(keep=6)"):
        for wrong, shown in (
            (torch.ones(width + 1), "are 33 wide, and image features 32: project them"),
            (torch.ones(2, width), "those of 2 rows, and the call has 3"),
            (torch.ones(1, width, dtype=torch.int64), r"int64 \[1, 32\]; pass floats"),
            (torch.ones(1, 1, width), r"float32 \[1, 1, 32\]; pass floats"),
            ([1.0], "are a list; pass a tensor"),
        ):
            with pytest.raises(InputError, match=shown), hidrop.relevant_to(llava, wrong):
                llava(**batch(llava, ROWS))


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (lambda f, n: torch.arange(n), "returned tensor"),
        (lambda f, n: (torch.arange(n), None), r"returned \[\[3\], None\]"),
        (lambda f, n: (torch.zeros(len(f), n, dtype=torch.int64), None), "ascending in 0 to 15"),
        (lambda f, n: (torch.arange(14, 14 + n).expand(len(f), n), None), "ascending in 0 to 15"),
        (lambda f, n: (torch.arange(n).expand(len(f), n), f[:, :1]), r"\[3, 1, 32\]"),
    ],
    ids=["bare", "shape", "twice", "beyond", "rows"],
)
def test_a_reducer_that_returns_something_else_is_named(
    returned: Any, shown: str, llava: Any
) -> None:
    register_reducer("mine", keep=lambda tokens: 3)(lambda features, keep: returned(features, keep))
    with (
        compiled_eagerly(llava, "before=mine(),positions=compact"),
        pytest.raises(
            PassError, match=rf"before=mine\(\) returned(?s:.*){shown.removeprefix('returned ')}"
        ),
    ):
        llava(**batch(llava, ROWS))


def test_a_need_that_nothing_provides_is_named() -> None:
    with pytest.raises(ScheduleError, match="needs sound, which nothing provides"):
        register_reducer("mine", keep=lambda tokens: 3, needs=("sound",))
