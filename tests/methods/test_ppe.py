"""PPE, held against the rule of its released code (facts in part B, section 5), one token at a time.

Density peaks per frame, ceil(ratio n) clusters, k = 5 or fewer; plain means in the order of the centres' scores; the last members
first, cycling; M-RoPE sections split into K parts, laid out T..T H..H W..W; new tokens behind the largest id of the whole prompt.
Ties go to the lower index, where the code draws noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import InputError, Schedule, ScheduleError, UnsupportedModelError
from hidrop_fx.models.rope_parts import rope_parts
from hidrop_fx.ops.density_peaks import density_clusters, merged_by_density
from tests.support import counter
from tests.support.families import CASES, IMAGE, VIDEO
from tests.support.families.batches import Batch, RowOf
from tests.support.families.case import VIDEO_TOKEN, Case, random_model, text_config
from tests.support.families.grids import MROPE, TOKENS, vision
from tests.support.families.reference import FamilyReference, Result
from tests.support.gridded import Grid, generated, gridded_batch
from tests.support.models import tiny_llava
from tests.support.runtimes import last_layout

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
ROWS: Any = [
    [5, IMAGE, 6, 7],
    [8, IMAGE, 9, 10, IMAGE, 11, 12],
    [13, 14, 15],
    [16, VIDEO, 3, IMAGE, 19],
]
GRIDS: list[Grid] = [(1, 8, 10), (1, 12, 12), (1, 4, 6), (1, 6, 6)]
VIDEOS: list[Grid] = [(3, 6, 8)]
RATIO, COPIES = 0.45, 2
SCHEDULE = f"before=density_peaks(ratio={RATIO},copies={COPIES})"


def sizes(head_dim: int, sections: list[int]) -> dict[str, Any]:
    """Of a text model of two heads."""
    return {
        "head_dim": head_dim, "hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {**MROPE, "mrope_section": sections},
    }  # fmt: skip


def qwen2_5_vl(head_dim: int = 32, sections: Any = (4, 6, 6)) -> Any:
    text = text_config(hf.Qwen2_5_VLTextConfig, **sizes(head_dim, list(sections)))
    tower = vision(window_size=16, fullatt_block_indexes=[1], out_hidden_size=2 * head_dim)
    config = hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen2_5_VLForConditionalGeneration, config)


def qwen2_vl() -> Any:
    text = text_config(hf.Qwen2VLTextConfig, **sizes(32, [4, 6, 6]))
    tower = {
        "depth": 1, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
    }  # fmt: skip
    config = hf.Qwen2VLConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen2VLForConditionalGeneration, config)


CASE = replace(CASES["qwen2_5_vl"], make=qwen2_5_vl)
OLDER = replace(CASES["qwen2_vl"], make=qwen2_vl)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return CASE.make()


def a_batch(model: Any, rows: Any = ROWS, padding: Any = "left", case: Case = CASE) -> Batch:
    return gridded_batch(case, model, rows, images=GRIDS, videos=VIDEOS, padding=padding)


# The rule, written out.


def clusters(tokens: Tensor, count: int) -> list[list[int]]:
    """Members of each cluster, in the order of the centres' scores."""
    n, width = tokens.shape
    states = tokens.detach().double()

    def distance(i: int, j: int) -> float:
        return math.dist(states[i].tolist(), states[j].tolist()) / math.sqrt(width)

    table = [[distance(i, j) for j in range(n)] for i in range(n)]
    k = 5 if count >= 5 else min(3, max(count // 2, 1))
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in table]
    farthest = max(max(row) for row in table)
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * min((table[i][j] for j in denser), default=farthest))
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:count]
    found: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        own = centres.index(i) if i in centres else None
        near = [table[c][i] for c in centres]
        found[near.index(min(near)) if own is None else own].append(i)
    return found


def merged_row(row: RowOf, ratio: float, copies: int) -> RowOf:
    """A row as its authors' code hands it to the decoder: position ids [3 K, n], T..T H..H W..W."""
    columns, features, ids = [], [], []
    column = taken = 0
    while column < len(row.ids):
        if not row.vision[column]:
            columns.append(column)
            ids.append(row.position_ids[:, column].repeat_interleave(copies))
            column += 1
            continue
        end = column
        while end < len(row.ids) and row.vision[end] and row.ids[end] == row.ids[column]:
            end += 1
        frames = VIDEOS[0][0] if int(row.ids[column]) == VIDEO_TOKEN else 1
        each = (end - column) // frames
        for f in range(frames):
            first = column + f * each
            own = row.features[taken + f * each : taken + (f + 1) * each]
            for place, members in enumerate(clusters(own, max(math.ceil(each * ratio), 1))):
                columns.append(first + place)
                features.append(own[members].mean(dim=0))
                last = [members[::-1][k % len(members)] for k in range(copies)]
                ids.append(row.position_ids[:, [first + i for i in last]].flatten())
        taken += end - column
        column = end
    where = torch.tensor(columns)
    width = row.features.shape[1]
    return replace(
        row,
        columns=row.columns[where],
        ids=row.ids[where],
        vision=row.vision[where],
        features=torch.stack(features) if features else torch.zeros(0, width),
        position_ids=torch.stack(ids, dim=1),
    )


class PpeReference(FamilyReference):
    """M-RoPE of 3 K ids a token, as the authors' `apply_multimodal_rotary_pos_emb_ppe` has it."""

    def _rotation(self, index: int, hidden: Tensor, ids: Tensor) -> Any:
        embedding = self.decoder.rotary_emb
        copies = len(ids) // 3
        sections = self.config.rope_parameters["mrope_section"]
        split = [s // copies for s in sections for _ in range(copies)]
        freqs = ids[..., None].float() * embedding.inv_freq
        parts = [m[i % len(ids)] for i, m in enumerate(freqs.split(split, dim=-1))]
        table = torch.cat(parts, dim=-1)
        table = torch.cat([table, table], dim=-1)
        return table.cos(), table.sin()


def shortened(made: Batch, copies: int = COPIES, ratio: float = RATIO) -> list[RowOf]:
    return [merged_row(row, ratio, copies) for row in made.rows]


def results(model: Any, after: Schedule, rows: list[RowOf], case: Case = CASE) -> list[Result]:
    reference = PpeReference(model, after, case)
    return [reference.run(row, reference.embeds(row)) for row in rows]


@contextmanager
def compiled(model: Any, schedule: Any, **options: Any) -> Iterator[None]:
    """Compile for the block, and restore behind it."""
    hidrop.compile(model, schedule, **{"backend": "eager", **options})
    try:
        yield
    finally:
        hidrop.restore(model)


EVENTS = (
    "",
    "prune=1:3+2:0.5,",
    "inject=1,prune=2:2,exit=3,",
    "cache=snapkv(window=2,capacity=6),",
)


@torch.no_grad()
def assert_as_the_authors(
    model: Any, rest: str, made: Batch, copies: int = COPIES, case: Case = CASE
) -> None:
    """Tokens of each layer, ids, logits, caches, and four tokens that follow."""
    schedule = Schedule.parse(f"{rest}before=density_peaks(ratio={RATIO},copies={copies})")
    short = shortened(made, copies)
    after = Schedule.parse(rest.rstrip(",") or "identity")
    expected = results(model, after, short, case)
    reference = PpeReference(model, after, case)
    said = [reference.generate(row, reference.embeds(row), 4)[0] for row in short]
    with compiled(model, schedule):
        output = model(**made.inputs, use_cache=True)
        layout = last_layout(model)
        for b, (row, result) in enumerate(zip(short, expected, strict=True)):
            where = row.columns[result.columns]
            torch.testing.assert_close(output.logits[b, where], result.logits, **CLOSE)
            others = torch.ones(output.logits.shape[1], dtype=torch.bool)
            others[where] = False
            assert not output.logits[b, others].any()
            ids = row.position_ids.view(3, copies, -1).transpose(0, 1)
            if copies > 1:
                assert layout.position_copies is not None
                assert layout.position_copies[:, :, b, row.columns].tolist() == ids.tolist()
            assert layout.position_ids[:, b, row.columns].tolist() == ids[0].tolist()
        seen = [layer.query for layer in layout.plan.layers]
        assert [layout.counts[s] for s in seen] == [
            list(each) for each in zip(*(row.tokens for row in expected), strict=True)
        ]
        cache = output.past_key_values
        for k, layer in enumerate(cache.layers):
            assert cache.get_seq_length(k) == max(row.tokens[k] for row in expected)
            columns = cache.log.columns[layer.segment]
            for b, row in enumerate(expected):
                assert int((columns[b] < layout.columns).sum()) == row.tokens[k]
        whole = [int(row.position_ids.max()) + 1 for row in made.rows]
        assert cache.log.next_ids("text").tolist() == whole
        assert generated(model, made) == said


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rest", EVENTS[:3])
def test_the_decoder_sees_what_the_authors_hand_it(rest: str, padding: Any, qwen: Any) -> None:
    assert_as_the_authors(qwen, rest, a_batch(qwen, padding=padding))


def test_at_the_authors_settings(qwen: Any) -> None:
    """Qwen2.5-VL's own sections, [16, 24, 24], eight ids a token; and a single one."""
    large = qwen2_5_vl(128, (16, 24, 24))
    assert Schedule.parse("ppe") == Schedule(before="density_peaks(ratio=0.45,copies=8)")
    assert_as_the_authors(large, "", a_batch(large, ROWS[:2]), copies=8)
    assert_as_the_authors(qwen, "", a_batch(qwen, ROWS[:2]), copies=1)


@pytest.mark.slow
@pytest.mark.parametrize("rest", EVENTS[:3])
def test_of_qwen2_vl_too(rest: str) -> None:
    model = OLDER.make()
    assert_as_the_authors(model, rest, a_batch(model, case=OLDER), case=OLDER)


def test_members_come_from_the_last_on_and_over_again() -> None:
    """Observed in the released code, with a stable sort."""
    features = torch.full((1, 24, 4), 50.0) + torch.rand(24, 4)
    members = [3, 5, 9, 13, 14, 18, 23]
    features[0, members] = torch.rand(7, 4)
    of = density_clusters(features, 2)[0]
    assert of[members].unique().numel() == 1
    number = int(of[3])
    for copies, last in ((4, [23, 18, 14, 13]), (9, [23, 18, 14, 13, 9, 5, 3, 23, 18])):
        places, rows, borne = merged_by_density(features, 2, copies=copies)
        assert borne[0, number].tolist() == last
        torch.testing.assert_close(rows[0, number], features[0, members].mean(dim=0))
        assert places.tolist() == [[0, 1]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 20])
def test_clusters_are_those_of_the_rule(count: int) -> None:
    features = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(count))
    features[1, 5:9] = features[1, 4]  # equal tokens
    found = density_clusters(features, count)
    for tokens, of in zip(features, found.tolist(), strict=True):
        expected = clusters(tokens, count)
        assert [[i for i in range(20) if of[i] == c] for c in range(count)] == expected


def test_parts_are_those_of_each_axis_dimensions() -> None:
    """In a row (Qwen2.5-VL), and interleaved (Qwen3-VL)."""
    in_a_row = [0, 0, 1, 1] + [0, 0, 0, 1, 1, 1] * 2
    assert rope_parts(qwen2_5_vl().get_decoder(), 3, 2).tolist() == in_a_row * 2
    text = text_config(hf.Qwen3VLTextConfig, **sizes(32, [8, 4, 4]))
    with torch.no_grad():
        decoder = hf.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel(text)
    axes = [0, 1, 2] * 4 + [0] * 4
    seen = {0: 0, 1: 0, 2: 0}
    expected = []
    for axis in axes:
        expected.append(seen[axis] * 2 // axes.count(axis))
        seen[axis] += 1
    assert rope_parts(decoder, 3, 2).tolist() == expected * 2


@torch.no_grad()
def test_an_image_at_the_end_keeps_its_last_token(qwen: Any) -> None:
    """It stays as it was, at its own id, behind the merged ones."""
    made = a_batch(qwen, [[5, IMAGE]])
    row = made.rows[0]
    own = merged_row(row, RATIO, COPIES)
    ends = replace(
        own,
        columns=torch.cat([own.columns, row.columns[-1:]]),
        ids=torch.cat([own.ids, row.ids[-1:]]),
        vision=torch.cat([own.vision, row.vision[-1:]]),
        features=torch.cat([own.features, row.features[-1:]]),
        position_ids=torch.cat(
            [own.position_ids, row.position_ids[:, -1:].repeat_interleave(COPIES, dim=0)], dim=1
        ),
    )
    (expected,) = results(qwen, Schedule(), [ends])
    with compiled(qwen, SCHEDULE):
        output = qwen(**made.inputs)
        assert last_layout(qwen).counts["text"] == [2]
    torch.testing.assert_close(output.logits[0, -1], expected.logits[-1], **CLOSE)


@torch.no_grad()
def test_calls_without_images_and_several_answers(qwen: Any) -> None:
    rows = [[5, 6, 7], [8, 9]]
    text, made = a_batch(qwen, rows), a_batch(qwen)
    plain = generated(qwen, text)
    options = {"num_beams": 2, "num_return_sequences": 2}
    with compiled(qwen, SCHEDULE):
        assert generated(qwen, text) == plain
        together = generated(qwen, made, **options)
        # Images come in turn: rows of the same first images.
        alone = generated(qwen, a_batch(qwen, ROWS[:1]), **options)
    assert together[:2] == alone


@pytest.mark.parametrize("rest", EVENTS)
@torch.no_grad()
def test_it_equals_the_plain_loop_and_recorded_graphs(rest: str, qwen: Any) -> None:
    made = a_batch(qwen)
    with compiled(qwen, rest + SCHEDULE):
        report = hidrop.compare(qwen, **made.inputs)
        assert report.ok, str(report)
        plain = generated(qwen, made)
    with compiled(qwen, rest + SCHEDULE, cuda_graphs=True):
        assert [generated(qwen, made) for _ in range(2)] == [plain, plain]


@pytest.mark.slow
@torch.no_grad()
def test_other_sizes_compile_nothing(qwen: Any) -> None:
    with compiled(qwen, SCHEDULE, backend="aot_eager"):
        generated(qwen, a_batch(qwen))
        with counter.expect(captures=0, compiled=0):
            generated(qwen, a_batch(qwen, [*ROWS[1:], ROWS[0]]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compilers_generate_the_same(backend: str, qwen: Any) -> None:
    made = a_batch(qwen)
    with compiled(qwen, EVENTS[2] + SCHEDULE):
        plain = generated(qwen, made)
    with compiled(qwen, EVENTS[2] + SCHEDULE, backend=backend):
        assert generated(qwen, made) == plain


def test_gradients_are_those_of_the_merged_rows() -> None:
    model, twin = CASE.make().train(), CASE.make().train()
    made, again = a_batch(model, ROWS[:2], "right"), a_batch(twin, ROWS[:2], "right")
    labels = torch.full_like(made.inputs["input_ids"], -100)
    for b, row in enumerate(made.rows):
        labels[b, row.columns[-1]] = 9
    losses = [
        -result.logits[-2].log_softmax(-1)[9]
        for result in results(twin, Schedule(), shortened(again))
    ]
    expected = torch.stack(losses).mean()
    expected.backward()
    with compiled(model, SCHEDULE):
        loss = model(**made.inputs, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    others, checked = dict(twin.named_parameters()), 0
    for name, parameter in model.named_parameters():
        wanted = others[name].grad
        if wanted is None or name.endswith("k_proj.bias"):
            continue
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
        checked += name.startswith("model.visual")
    assert checked


# As every other preset.


@torch.no_grad()
def test_tools_tell_of_it(tmp_path: Path) -> None:
    model = CASE.make()
    made = a_batch(model)
    left = [int(row.vision.sum()) for row in shortened(made)]
    whole = [int(row.vision.sum()) for row in made.rows]
    hidrop.compile(model, "prune=1:0.5," + SCHEDULE, backend="eager")
    explained = hidrop.explain(model, **made.inputs)
    assert [row.vision_tokens for row in explained.rows] == left
    plain = generated(model, made)
    assert list(hidrop.inspect(model).vision_tokens) == whole
    assert last_layout(model).removed == [a - b for a, b in zip(whole, left, strict=True)]
    hidrop.dump(model, tmp_path / "dump")
    replayed = hidrop.replay(tmp_path / "dump", model, **made.inputs)
    assert replayed.ok, str(replayed)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    hidrop.load(again, tmp_path / "saved", backend="eager")
    assert generated(again, made) == plain
    hidrop.warmup(model, [hidrop.Shape(batch=2, text=4, images=1, image_tokens=6)])
    with hidrop.use(model, Schedule()):
        generated(model, made)
        assert last_layout(model).removed == [0] * 4


def test_costs_count_what_reaches_the_decoder() -> None:
    costs = hidrop.plan(
        "ppe", num_layers=4, hidden_size=64, intermediate_size=128, vision_tokens=30, images=2
    )
    assert costs.vision_tokens == (14,) * 4
    assert Schedule.preset("ppe", ratio=0.01).entering_tokens(20) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppe(ratio=0)", "ratio=0 is not a share of the tokens"),
        ("ppe(ratio='x')", "ratio='x' is not a share"),
        ("ppe(copies=0)", "copies=0 is not a number of position ids"),
        ("ppe(copies=1.5)", "copies=1.5 is not a number of position ids"),
        ("ppe(k=8)", "'k' for method 'ppe'; write ppe"),
        (f"{SCHEDULE},positions=compact", "positions='compact' numbers tokens anew, and before="),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_videos_numbered_as_text_are_refused_by_name(qwen: Any) -> None:
    inputs = a_batch(qwen, ROWS[3:]).inputs
    del inputs["mm_token_type_ids"]
    with compiled(qwen, SCHEDULE), pytest.raises(InputError, match="pass mm_token_type_ids"):
        qwen(**inputs)


def test_models_that_it_is_not_for_are_refused_by_name(qwen: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match="position ids of LlavaForConditionalGeneration have one axis"
    ):
        hidrop.compile(tiny_llava(), "ppe")
    with pytest.raises(
        ScheduleError, match=r"copies=8 does not divide .*\[4, 6, 6\] in .*: use copies=1 or 2"
    ):
        hidrop.compile(qwen, "ppe")
    with pytest.raises(UnsupportedModelError, match=r"Qwen3VL.*has features between its layers"):
        hidrop.compile(CASES["qwen3_vl"].make(), "ppe")
    assert not hidrop.is_compiled(qwen)
