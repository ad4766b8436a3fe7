"""Index-Preserving pruning, held against its rule (facts of the released code, part B, section 6), one cell at a time.

Logit > 0 on the first frame, 3 x 3 dilation, kept ids with text behind the largest of them, decoding on from the largest id of
all. The tower is run here with explicit masks, each image for itself (the released code lets the first patch of a second image
see the first one).
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
from torch import Tensor, nn

import hidrop_fx as hidrop
from hidrop_fx import HidropError, InputError, Schedule, ScheduleError, UnsupportedModelError
from tests.support import counter
from tests.support.families import CASES, IMAGE, VIDEO, make_batch
from tests.support.families.batches import Batch, RowOf
from tests.support.families.reference import FamilyReference, Result
from tests.support.gridded import generated, gridded_batch
from tests.support.models import batch, tiny_llava
from tests.support.runtimes import last_layout

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

CASE = CASES["qwen2_5_vl"]
PRESET = Schedule.preset("index-preserving")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
ROWS: Any = [
    [5, IMAGE, 6, 7],
    [8, IMAGE, 9, 10, IMAGE, 11, 12],
    [13, 14, 15],
    [16, VIDEO, 3, IMAGE, 19],
]
GRIDS = [(1, 10, 12), (1, 12, 8), (1, 8, 10), (1, 10, 10)]
"""Patches of the images in time, height and width; windows are 4 patches wide."""
VIDEOS = [(2, 4, 6)]


class PatchClassifier(nn.Module):
    """As the authors' own: a norm over the pixels, a convolution as large as the cell, GELU, one logit."""

    def __init__(self, side: int, features: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([3, side, side])
        self.conv = nn.Conv2d(3, features, side, side)
        self.gelu, self.fc = nn.GELU(), nn.Linear(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.conv(self.norm(x))).squeeze(-1).squeeze(-1)
        return self.fc(x).squeeze(-1)  # type: ignore[no-any-return]


def a_classifier(bias: float = -0.75) -> PatchClassifier:
    """One that takes few cells for foreground."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = PatchClassifier(8)
        nn.init.normal_(made.conv.weight, 0.0, 0.2)
        nn.init.normal_(made.fc.weight, 0.0, 0.5)
        nn.init.constant_(made.fc.bias, bias)
    return made.eval()


def a_batch(model: Any, rows: Any = ROWS, padding: Any = "left") -> Batch:
    """Images of many sizes, so that windows are cut in every way."""
    return gridded_batch(CASE, model, rows, images=GRIDS, videos=VIDEOS, padding=padding)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return CASE.make()


@pytest.fixture(scope="module")
def classifier() -> PatchClassifier:
    return a_classifier()


# The rule, written out.


def kept_cells(
    classifier: nn.Module, patches: Tensor, height: int, width: int
) -> list[tuple[int, int]]:
    """Of one image [h w, 96], cell by cell: each cell's pixels are put together one patch at a time."""
    above = {}
    for i in range(height // 2):
        for j in range(width // 2):
            first = 4 * (i * (width // 2) + j)
            cell = torch.empty(3, 8, 8)
            for a in range(2):
                for b in range(2):
                    patch = patches[first + 2 * a + b].view(3, 2, 4, 4)
                    cell[:, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] = patch[:, 0]
            with torch.no_grad():
                above[i, j] = float(classifier(cell[None])) > 0
    around = [-1, 0, 1]
    return [
        (i, j)
        for i, j in above
        if any(above.get((i + a, j + b), False) for a in around for b in around)
    ]


def tower(model: Any, patches: Tensor, cells: list[tuple[int, int]], width: int) -> Tensor:
    """Features of the kept cells of one image: HF's blocks, part by part, with explicit masks in the place of segments."""
    visual = model.model.visual
    places = [(2 * i + a, 2 * j + b) for i, j in cells for a in (0, 1) for b in (0, 1)]
    rows = [4 * (i * (width // 2) + j) + k for i, j in cells for k in range(4)]
    hidden = visual.patch_embed(patches[rows])
    cos, sin = visual.rotary_pos_emb(hidden, torch.tensor(places))
    window = [(i // 4, j // 4) for i, j in places]
    same = torch.tensor([[a == b for b in window] for a in window])
    for k, block in enumerate(visual.blocks):
        seen = torch.ones_like(same) if k in visual.fullatt_block_indexes else same
        part = block.attn
        q, key, value = (
            part.qkv(block.norm1(hidden)).view(len(rows), 3, part.num_heads, -1).unbind(1)
        )

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]

        weights = torch.einsum("qhd,khd->hqk", turned(q), turned(key)) / math.sqrt(q.shape[-1])
        weights = weights.masked_fill(~seen, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value).reshape(len(rows), -1)
        hidden = hidden + part.proj(mixed)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)  # type: ignore[no-any-return]


def shortened(model: Any, classifier: nn.Module, made: Batch) -> list[RowOf]:
    """Each row as its authors' code hands it to the decoder."""
    image_token = model.config.image_token_id
    grids = made.inputs["image_grid_thw"].tolist() if "image_grid_thw" in made.inputs else []
    pixels = made.inputs.get("pixel_values")
    image, found = 0, []
    for row in made.rows:
        stays, ids, features = [], [], []
        column, video, shift = 0, 0, 0
        videos = row.features  # of a row's items in order; those of images are not read
        while column < len(row.ids):
            token = int(row.ids[column])
            own = row.position_ids[:, column]
            if token != image_token:
                stays.append(column)
                ids.append(own - shift)
                if row.vision[column]:
                    features.append(videos[video])
                    video += 1
                column += 1
                continue
            _, height, width = grids[image]
            start = sum(a * b * c for a, b, c in grids[:image])
            patches = pixels[start : start + height * width]
            cells = kept_cells(classifier, patches, height, width)
            count = height * width // 4
            stays += [column + i * (width // 2) + j for i, j in cells]
            first = int(own[1]) - shift
            ids += [torch.tensor([first, first + i, first + j]) for i, j in cells]
            if cells:
                features += tower(model, patches, cells, width)
            largest = max((first + max(i, j) for i, j in cells), default=first - 1)
            shift += int(own[1]) - shift + max(height, width) // 2 - (largest + 1)
            image, column, video = image + 1, column + count, video + count
        hidden = model.get_input_embeddings().weight.shape[1]
        found.append(
            replace(
                row,
                columns=row.columns[stays],
                ids=row.ids[stays],
                vision=row.vision[stays],
                features=torch.stack(features) if features else torch.zeros(0, hidden),
                position_ids=torch.stack(ids, dim=1),
            )
        )
    return found


def results(model: Any, after: Schedule, rows: list[RowOf]) -> list[Result]:
    reference = FamilyReference(model, after, CASE)
    return [reference.run(row, reference.embeds(row)) for row in rows]


@contextmanager
def compiled(model: Any, schedule: Any, classifier: Any, **options: Any) -> Iterator[None]:
    """Compile for the block, and restore behind it."""
    given = {"backend": "eager", "modules": {"classifier": classifier}, **options}
    hidrop.compile(model, schedule, **given)
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


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rest", EVENTS[:3])
@torch.no_grad()
def test_the_decoder_sees_what_the_authors_hand_it(
    rest: str, padding: Any, qwen: Any, classifier: Any
) -> None:
    """Tokens of each layer, ids, logits, caches, and four tokens that follow."""
    schedule = Schedule.parse(f"{rest}before=foreground(),positions=gapless")
    made = a_batch(qwen, padding=padding)
    short = shortened(qwen, classifier, made)
    after = Schedule.parse(rest.rstrip(",") or "identity")
    expected = results(qwen, after, short)
    whole = [int(row.vision.sum()) for row in made.rows]
    assert all(0 < int(s.vision.sum()) < n for s, n in zip(short, whole, strict=True) if n)
    reference = FamilyReference(qwen, after, CASE)
    said = [reference.generate(row, reference.embeds(row), 4)[0] for row in short]
    with compiled(qwen, schedule, classifier):
        output = qwen(**made.inputs, use_cache=True)
        layout = last_layout(qwen)
        for b, (row, result) in enumerate(zip(short, expected, strict=True)):
            where = row.columns[result.columns]
            torch.testing.assert_close(output.logits[b, where], result.logits, **CLOSE)
            others = torch.ones(output.logits.shape[1], dtype=torch.bool)
            others[where] = False
            assert not output.logits[b, others].any()
            assert layout.position_ids[:, b, row.columns].tolist() == row.position_ids.tolist()
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
        following = [int(row.position_ids.max()) + 1 for row in short]
        assert cache.log.next_ids("text").tolist() == following
        assert generated(qwen, made) == said


def test_text_behind_an_image_goes_on_behind_the_cells_that_are_left(qwen: Any) -> None:
    """18 in the place of 20, as it was seen to run: the last rows and columns of the image are gone."""

    class Upper(nn.Module):
        """Takes the very first cell, which alone is white, for foreground."""

        def forward(self, cells: Tensor) -> Tensor:
            return cells.mean(dim=(1, 2, 3)) - 0.5

    made = make_batch(
        replace(
            CASE,
            images=lambda model, counts: {
                "pixel_values": torch.zeros(64, 96).index_fill(0, torch.arange(4), 1.0),
                "image_grid_thw": torch.tensor([[1, 8, 8]]),
            },
        ),
        qwen,
        [[5, IMAGE, 6, 7]],
    )
    with compiled(qwen, PRESET, Upper()):
        qwen(**made.inputs)
        layout = last_layout(qwen)
        kept = layout.vision_columns[0].tolist()
        assert kept == [1, 2, 5, 6]  # two by two of four by four
        assert layout.position_ids[:, 0, kept].tolist() == [[1] * 4, [1, 1, 2, 2], [1, 2, 1, 2]]
        assert (
            layout.position_ids[:, 0, -3:-1].tolist() == [[3, 4]] * 3
        )  # 5, 6 with the whole image
        assert layout.next_ids["text"] == [5]


@torch.no_grad()
def test_an_image_without_foreground_is_as_one_that_is_not_there(
    qwen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The released code stops; here no token is left of it, and a line says so."""
    made, none = a_batch(qwen, ROWS[:2]), a_classifier(bias=-50.0)
    without = make_batch(CASE, qwen, [[5, 6, 7], [8, 9, 10, 11, 12]])
    with compiled(qwen, PRESET, none):
        found = generated(qwen, made)
        assert last_layout(qwen).vision_counts["inject_0"] == [0, 0]
        assert generated(qwen, without) == found
    assert "found no foreground in 3 of 3 images" in caplog.text


@torch.no_grad()
def test_an_image_at_the_end_keeps_its_last_token(qwen: Any) -> None:
    made = a_batch(qwen, [[5, IMAGE]])
    with compiled(qwen, PRESET, a_classifier(bias=-50.0)):
        output = qwen(**made.inputs)
        assert last_layout(qwen).counts["text"] == [2]
    visual = tower(qwen, made.inputs["pixel_values"], [(4, 5)], 12)
    row = made.rows[0]
    ends = replace(
        row,
        ids=row.ids[[0, -1]],
        vision=row.vision[[0, -1]],
        position_ids=row.position_ids[:, [0, -1]],
        features=visual,
    )
    (expected,) = results(qwen, Schedule(), [ends])
    torch.testing.assert_close(output.logits[0, -1], expected.logits[-1], **CLOSE)


@torch.no_grad()
def test_calls_without_images_and_several_answers(qwen: Any, classifier: Any) -> None:
    rows = [[5, 6, 7], [8, 9]]
    text, made = make_batch(CASE, qwen, rows), a_batch(qwen)
    plain = generated(qwen, text)
    options = {"num_beams": 2, "num_return_sequences": 2}
    with compiled(qwen, PRESET, classifier):
        assert generated(qwen, text) == plain
        together = generated(qwen, made, **options)
        images = [row.count(IMAGE) for row in ROWS]
        alone = []
        for b, row in enumerate(ROWS):
            start = sum(images[:b])
            found = made_alone(qwen, made, row, start, images[b])
            alone += generated(qwen, found, **options)
    assert together == alone


def made_alone(model: Any, made: Batch, row: Any, start: int, images: int) -> Batch:
    """One row of a batch as a call of its own, with its images of the batch."""
    grids = made.inputs["image_grid_thw"]
    ends = [0, *grids.prod(1).cumsum(0).tolist()]
    given = {
        "pixel_values": made.inputs["pixel_values"][ends[start] : ends[start + images]],
        "image_grid_thw": grids[start : start + images],
    }
    videos = {k: v for k, v in made.inputs.items() if "video" in k}
    case = replace(CASE, images=lambda *_: given, videos=lambda *_: videos)
    return make_batch(case, model, [row])


@pytest.mark.parametrize("rest", EVENTS)
@torch.no_grad()
def test_it_equals_the_plain_loop_and_recorded_graphs(
    rest: str, qwen: Any, classifier: Any
) -> None:
    schedule = Schedule.parse(f"{rest}before=foreground(),positions=gapless")
    made = a_batch(qwen)
    with compiled(qwen, schedule, classifier):
        report = hidrop.compare(qwen, **made.inputs)
        assert report.ok, str(report)
        plain = generated(qwen, made)
    with compiled(qwen, schedule, classifier, cuda_graphs=True):
        assert [generated(qwen, made) for _ in range(2)] == [plain, plain]


@pytest.mark.slow
@torch.no_grad()
def test_another_number_of_cells_compiles_nothing(qwen: Any, classifier: Any) -> None:
    made, other = a_batch(qwen), a_batch(qwen, [*ROWS[1:], ROWS[0]])
    with compiled(qwen, PRESET, classifier, backend="aot_eager"):
        generated(qwen, made)
        with counter.expect(captures=0, compiled=0):
            generated(qwen, other)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compilers_generate_the_same(backend: str, qwen: Any, classifier: Any) -> None:
    made = a_batch(qwen)
    with compiled(qwen, EVENTS[2] + str(PRESET), classifier):
        plain = generated(qwen, made)
    with compiled(qwen, EVENTS[2] + str(PRESET), classifier, backend=backend):
        assert generated(qwen, made) == plain


def test_gradients_go_to_the_cells_that_stay(classifier: Any) -> None:
    """The loss of a training step and its gradients, of tower and decoder, are those of the shortened rows."""
    model, twin = CASE.make().train(), CASE.make().train()
    made = a_batch(model, ROWS[:2], "right")
    labels = torch.full_like(made.inputs["input_ids"], -100)
    for b, row in enumerate(made.rows):
        labels[b, row.columns[-1]] = 9
    losses = [
        -result.logits[-2].log_softmax(-1)[9]
        for result in results(twin, Schedule(), shortened(twin, classifier, made))
    ]
    expected = torch.stack(losses).mean()
    expected.backward()
    with compiled(model, PRESET, classifier):
        loss = model(**made.inputs, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    others = dict(twin.named_parameters())
    checked = 0
    for name, parameter in model.named_parameters():
        wanted = others[name].grad
        if wanted is None or name.endswith("k_proj.bias"):
            continue
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
        checked += name.startswith("model.visual")
    assert checked
    assert all(p.grad is None for p in classifier.parameters())


# As every other preset.


def test_it_is_a_schedule_in_every_form(tmp_path: Path) -> None:
    assert Schedule(before="foreground()", positions="gapless") == PRESET
    assert Schedule.parse("index-preserving") == Schedule.parse(str(PRESET)) == PRESET
    assert Schedule.from_json(PRESET.to_json()) == PRESET
    costs = hidrop.plan(
        PRESET, num_layers=4, hidden_size=64, intermediate_size=128, vision_tokens=30
    )
    assert costs.vision_tokens == (30,) * 4  # the most


@torch.no_grad()
def test_tools_tell_of_it(tmp_path: Path, classifier: Any) -> None:
    model = CASE.make()
    made = a_batch(model)
    left = [int(row.vision.sum()) for row in shortened(model, classifier, made)]
    whole = [int(row.vision.sum()) for row in made.rows]
    schedule = Schedule.parse("prune=1:0.5,before=foreground(),positions=gapless")
    hidrop.compile(model, schedule, backend="eager", modules={"classifier": classifier})
    explained = hidrop.explain(model, **made.inputs)
    assert [row.vision_tokens for row in explained.rows] == whole
    assert "how many follows from the pixels" in str(explained)
    plain = generated(model, made)
    inspected = hidrop.inspect(model)
    assert list(inspected.vision_tokens) == whole
    assert last_layout(model).removed == [a - b for a, b in zip(whole, left, strict=True)]
    assert len(hidrop.heatmap(model, made.inputs, None)) == len(GRIDS) + VIDEOS[0][0]
    hidrop.dump(model, tmp_path / "dump")
    assert hidrop.replay(tmp_path / "dump", model, **made.inputs).ok
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    with pytest.raises(ScheduleError, match=r"reads modules\['classifier'\], a trained module"):
        hidrop.load(again, tmp_path / "saved", backend="eager")
    assert not hidrop.is_compiled(again)
    hidrop.load(again, tmp_path / "saved", backend="eager", modules={"classifier": classifier})
    assert generated(again, made) == plain
    hidrop.compile(model, schedule, backend="eager", cuda_graphs=True, on_new_shape="compile")
    with counter.expect(recorded=range(1, 9)):
        hidrop.warmup(model, [hidrop.Shape(batch=2, text=4, images=1, image_tokens=6)])
    assert last_layout(model).vision_counts["inject_0"] == [6, 6]
    assert generated(model, made) == plain
    with hidrop.use(model, Schedule()):
        generated(model, made)
        assert last_layout(model).removed == [0] * 4


class Wrong(nn.Module):
    def forward(self, cells: Tensor) -> Tensor:
        return cells.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({}, ScheduleError, r"reads modules\['classifier'\], a trained module.*modules=\{'classifier': ...\}"),
        ({"classifier": PatchClassifier(28)}, ScheduleError, r"does not take the pixels of 2 cells, \[2, 3, 8, 8\]"),
        ({"classifier": Wrong()}, ScheduleError, r"returned \[2, 3\] for cells \[2, 3, 8, 8\]; return one logit"),
        ({"classifier": 3}, HidropError, r"modules\['classifier'\] is a int; pass a trained module"),
        ([3], HidropError, "modules=list: pass a dictionary"),
        ({"classifier": a_classifier(), "nobody": Wrong()}, HidropError, "modules has 'nobody', which no schedule reads"),
    ],
    ids=["none", "larger", "logits", "number", "list", "more"],
)  # fmt: skip
def test_modules_that_do_not_fit_are_named(
    modules: Any, error: Any, message: str, qwen: Any
) -> None:
    with pytest.raises(error, match=message):
        hidrop.compile(qwen, PRESET, modules=modules)
    assert not hidrop.is_compiled(qwen)


def test_other_towers_and_missing_pixels_are_refused_by_name(qwen: Any, classifier: Any) -> None:
    given = {"modules": {"classifier": classifier}}
    with pytest.raises(
        UnsupportedModelError, match=r"LlavaForConditionalGeneration is not like Qwen2\.5-VL's"
    ):
        hidrop.compile(tiny_llava(), PRESET, **given)
    with pytest.raises(UnsupportedModelError, match=r"Qwen3VL.*has features between its layers"):
        hidrop.compile(CASES["qwen3_vl"].make(), PRESET, **given)
    with pytest.raises(
        ScheduleError, match="positions='gapless' is about tokens that a stage before"
    ):
        Schedule(positions="gapless")
    made = a_batch(qwen, ROWS[:1])
    pixels = made.inputs.pop("pixel_values")
    output = qwen.model.get_image_features(pixels, made.inputs["image_grid_thw"], return_dict=True)
    with (
        compiled(qwen, PRESET, classifier),
        pytest.raises(InputError, match="needs the pixels of the call, since it chooses by them"),
    ):
        qwen(**made.inputs, mm_encoder_outputs={"image": output})


@torch.no_grad()
def test_gaps_are_closed_behind_other_reducers_too() -> None:
    """Ids of one axis: text goes on behind the last token of the image that is left."""
    model = tiny_llava("llama", num_layers=2, image_tokens=16)
    inputs = batch(model, [[5, 6, IMAGE, 7, IMAGE, 8], [3, 4]], padding="left")
    hidrop.compile(model, "before=divprune(ratio=0.3),positions=gapless", backend="eager")
    model(**inputs)
    layout = last_layout(model)
    ids = layout.position_ids[0].tolist()
    first = [c for c in layout.vision_columns[0].tolist() if c < 18]
    second = [c for c in layout.vision_columns[0].tolist() if 18 < c < 35]
    assert ids[:2] == [0, 1]
    assert [ids[c] for c in first] == first
    assert ids[18] == first[-1] + 1
    assert [ids[c] for c in second] == [c - 19 + ids[18] + 1 for c in second]
    assert ids[35] == ids[second[-1]] + 1
