"""Every measurement against what transformers' own hidden states and eager attentions say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.analysis.data.samples import prepare_samples
from hidrop_fx.analysis.measuring.attention_similarity import Ilvas
from hidrop_fx.analysis.measuring.influence import as_reference
from hidrop_fx.analysis.measuring.layers import measure_layers
from hidrop_fx.analysis.measuring.sweeps import exit_sweep, injection_sweep
from hidrop_fx.analysis.searching.trials import Trials
from hidrop_fx.errors import InputError
from tests.support.models import IMAGE, IMAGE_TOKEN, batch, tiny_llava

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS = ([5, 6, IMAGE, 7, 8, 9], [IMAGE, 11, IMAGE, 12], [20, 21, 22])
"""One image, two images, none."""
MODELS = (
    ("llama", {}),
    ("llama", {"kv_heads": 2}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {}),
    ("qwen2", {"sliding_window": 6}),
    ("qwen3", {"kv_heads": 1}),
)


class Direct:
    """Hidden states [k] and attentions [k] of transformers' eager model, for one batch."""

    def __init__(self, backbone: str, inputs: dict[str, Tensor], **options: Any) -> None:
        self.model = tiny_llava(backbone, attn="eager", **options)
        self.inputs = inputs
        self.states, self.attentions, self.logits = self._run(inputs["pixel_values"])
        first = inputs["pixel_values"][:1].expand_as(inputs["pixel_values"])
        self.other, _, _ = self._run(first)
        self.valid = inputs["attention_mask"].bool()
        self.vision = (inputs["input_ids"] == IMAGE_TOKEN) & self.valid
        self.text = self.valid & ~self.vision

    def _run(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        last: list[Tensor] = []
        norm = self.model.get_decoder().norm
        handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        with torch.no_grad():
            out = self.model(
                **{**self.inputs, "pixel_values": pixels},
                output_hidden_states=True,
                output_attentions=True,
            )
        handle.remove()
        return [*out.hidden_states[:-1], last[0]], list(out.attentions), out.logits

    def scores(self, layer: int, queries: list[list[int]]) -> list[Tensor]:
        """By row, head-wise attention [H, V] of the query rows' mean to the vision tokens."""
        attention = self.attentions[layer]
        return [
            attention[row][:, columns][:, :, self.vision[row]].mean(dim=1)
            for row, columns in enumerate(queries)
        ]


def mean(values: list[Tensor]) -> float:
    return float(torch.cat([v.double().flatten() for v in values]).mean())


def last_columns(inputs: dict[str, Tensor]) -> list[list[int]]:
    return [[int(row.nonzero().max())] for row in inputs["attention_mask"]]


def before_answers(labels: Tensor, valid: Tensor) -> list[list[int]]:
    starts = (labels[:, :-1] == -100) & (labels[:, 1:] != -100) & valid[:, :-1].bool()
    return [row.nonzero().flatten().tolist() for row in starts]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("backbone", "options"), MODELS, ids=str)
def test_measurements_are_those_of_hugging_face(
    backbone: str, options: dict[str, Any], padding: Any, plain: Any
) -> None:
    model = plain(backbone, **options)
    inputs = batch(model, ROWS, padding=padding, seed=3)
    direct = Direct(backbone, inputs, **options)
    measured, reference = measure_layers(
        model, prepare_samples(model, [inputs]), windows=(1, 2), tops=(3, 9, 12)
    )

    behind = direct.text & (direct.vision.cumsum(dim=1) > 0)
    queries = last_columns(inputs)
    for k in range(4):
        cosine = F.cosine_similarity(direct.states[k], direct.states[k + 1], dim=-1)
        assert measured.vision_similarity[k] == pytest.approx(
            mean([cosine[direct.vision]]), abs=1e-5
        )
        assert measured.text_similarity[k] == pytest.approx(mean([cosine[direct.text]]), abs=1e-5)
        moved = 1 - F.cosine_similarity(direct.states[k + 1], direct.other[k + 1], dim=-1)
        assert measured.influence[k] == pytest.approx(mean([moved[behind]]), abs=1e-5)
        scores = [s.mean(dim=0) for s in direct.scores(k, queries) if s.numel()]
        mass = mean([s.sum()[None] for s in scores])
        assert measured.attention_mass[k] == pytest.approx(mass, abs=1e-5)
        shares = [s / s.sum() for s in scores]
        entropy = mean([-(p * p.clamp(min=1e-30).log()).sum()[None] for p in shares])
        assert measured.attention_entropy[k] == pytest.approx(entropy, abs=1e-4)

    assert {(c.window, c.top) for c in measured.ilvas} == {
        (n, top) for n in (1, 2) for top in (3, 9, 12)
    }
    for curve in measured.ilvas:
        for k, value in enumerate(curve.values):
            if k + curve.window >= 4:
                assert value is None
                continue
            cosines = [
                F.cosine_similarity(now, later, dim=0)[now.mean(dim=0).argsort(descending=True)]
                for now, later in zip(
                    direct.scores(k, queries), direct.scores(k + curve.window, queries), strict=True
                )
                if now.shape[1] >= curve.top
            ]
            assert value == pytest.approx(mean([c[: curve.top] for c in cosines]), abs=1e-4)

    for row, columns in enumerate(queries):
        expected = direct.logits[row, columns[0]].log_softmax(dim=-1)
        torch.testing.assert_close(reference[0][row], expected, atol=2e-4, rtol=1e-4)


def test_with_labels_attention_is_read_before_each_answer(plain: Any) -> None:
    model = plain("llama")
    inputs = batch(model, ROWS[:2], padding="left", seed=1)
    ids = inputs["input_ids"]
    answers = (ids == 6) | (ids == 9) | (ids == 12)
    inputs["labels"] = torch.where(answers, ids, -100)
    queries = before_answers(inputs["labels"], inputs["attention_mask"])
    assert [len(row) for row in queries] == [2, 1]
    direct = Direct("llama", {k: v for k, v in inputs.items() if k != "labels"})
    measured, reference = measure_layers(model, prepare_samples(model, [inputs]))
    for k in range(4):
        scores = [s.mean(dim=0).sum()[None] for s in direct.scores(k, queries)]
        assert measured.attention_mass[k] == pytest.approx(mean(scores), abs=1e-5)
    asked = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
    expected = direct.logits[asked].log_softmax(dim=-1)
    torch.testing.assert_close(reference[0], expected, atol=2e-4, rtol=1e-4)


def test_batches_are_averaged_token_by_token(plain: Any) -> None:
    model = plain("qwen2")
    one = batch(model, ROWS, padding="right", seed=3)
    pixels = one["pixel_values"].split([1, 2])
    parts = [
        {**batch(model, [ROWS[0]]), "pixel_values": pixels[0]},
        {**batch(model, ROWS[1:], padding="right"), "pixel_values": pixels[1]},
    ]
    whole, _ = measure_layers(model, prepare_samples(model, [one]), windows=(1,), tops=(3,))
    split, _ = measure_layers(model, prepare_samples(model, parts), windows=(1,), tops=(3,))
    for name in ("vision_similarity", "text_similarity", "influence", "attention_mass"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), abs=1e-5)
    assert split.ilvas[0].values[:3] == pytest.approx(whole.ilvas[0].values[:3], abs=1e-5)


# Planted structure.


def blind(model: Any, layer: int) -> None:
    """A layer whose rows cannot see each other: attention adds nothing, its MLP goes on."""
    model.get_decoder().layers[layer].self_attn.o_proj.weight.data.zero_()


def copies(model: Any, layer: int) -> None:
    """A layer that adds nothing."""
    block = model.get_decoder().layers[layer]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()


def test_a_layer_that_copies_has_similarity_one() -> None:
    model = tiny_llava("llama", num_layers=5)
    copies(model, 2)
    measured, _ = measure_layers(model, prepare_samples(model, [batch(model, ROWS)]))
    assert measured.vision_similarity[2] == pytest.approx(1, abs=1e-6)
    assert measured.text_similarity[2] == pytest.approx(1, abs=1e-6)
    others = [v for k, v in enumerate(measured.vision_similarity) if k != 2]
    assert max(v for v in others if v is not None) < 0.99


def test_layers_that_cannot_see_vision_are_found() -> None:
    """Layers 0 and 1 only copy; text rows of layers 4 and 5 see no other row."""
    model = tiny_llava("llama", num_layers=6)
    for layer in (0, 1):
        copies(model, layer)
    for layer in (4, 5):
        blind(model, layer)
    calibration = hidrop.calibrate(model, [batch(model, ROWS[:2], seed=5)] * 2, progress=False)
    influence = calibration.measurements.influence
    assert influence[:2] == pytest.approx((0, 0), abs=1e-6)
    assert influence[2] > 1e-3
    assert calibration.injections.kl[:3] == pytest.approx((0, 0, 0), abs=1e-6)
    assert calibration.injections.kl[3] > 1e-3
    assert calibration.exits.layers[3:] == (4, 5, 6)
    assert calibration.exits.kl[3:] == pytest.approx((0, 0, 0), abs=1e-6)
    assert calibration.exits.kl[2] > 1e-3
    assert (calibration.choice.inject, calibration.choice.exit) == (2, 4)


def test_one_layer_that_sees_vision_is_found() -> None:
    """Only layer 2 mixes rows: without vision there, all schedules come to the same."""
    model = tiny_llava("llama", num_layers=5)
    for layer in (0, 1, 3, 4):
        blind(model, layer)
    calibration = hidrop.calibrate(model, [batch(model, ROWS[:2], seed=5)], progress=False)
    exits, injections = calibration.exits, calibration.injections
    never = [*exits.kl[:2], *injections.kl[3:]]
    assert min(never) > 1e-3
    assert never == pytest.approx([never[0]] * 4, rel=1e-3)
    assert exits.kl[2:] == pytest.approx((0, 0, 0), abs=1e-6)
    assert calibration.measurements.influence[:2] == pytest.approx((0, 0), abs=1e-6)
    assert calibration.measurements.influence[2] > 1e-3
    assert calibration.choice.exit == 3


def settle(model: Any, source: int, target: int) -> None:
    """Let `target` attend exactly as `source` does: same input, same norm, same projections."""
    layers = model.get_decoder().layers
    for k in range(source, target):
        copies(model, k)
    ours, theirs = layers[target], layers[source]
    ours.input_layernorm.weight.data.copy_(theirs.input_layernorm.weight.data)
    for name in ("q_proj", "k_proj"):
        getattr(ours.self_attn, name).weight.data.copy_(getattr(theirs.self_attn, name).weight.data)


def test_the_layer_where_attention_settles_has_ilvas_one() -> None:
    model = tiny_llava("llama", num_layers=6)
    settle(model, 2, 4)
    samples = prepare_samples(model, [batch(model, ROWS)])
    measured, _ = measure_layers(model, samples, windows=(2,), tops=(4, 8))
    assert [curve.top for curve in measured.ilvas] == [4, 8]
    for curve in measured.ilvas:
        assert curve.values[2] == pytest.approx(1, abs=1e-5)
        assert all(v < 0.995 for k, v in enumerate(curve.values) if v is not None and k != 2)


def test_ilvas_keeps_only_the_layers_it_compares() -> None:
    ilvas = Ilvas(20, windows=(2, 4), tops=(1,))
    for layer in range(20):
        ilvas.add(layer, torch.rand(1, 2, 5), torch.tensor([5]))
        assert len(ilvas._recent) <= 4


# Sweeps and trials.


@pytest.mark.parametrize(("backbone", "padding"), [("llama", "left"), ("qwen3", "right")])
def test_sweeps_compare_compiled_models_with_the_full_one(
    backbone: str, padding: Any, plain: Any
) -> None:
    model = plain(backbone)
    inputs = batch(model, ROWS, padding=padding, seed=2)
    samples = prepare_samples(model, [inputs])
    trials = Trials(model, samples, measure_layers(model, samples)[1])
    exits, injections = exit_sweep(trials, 4), injection_sweep(trials, 4)
    assert (exits.layers, injections.layers) == ((1, 2, 3, 4), (0, 1, 2, 3))
    assert exits.kl[-1] == pytest.approx(0, abs=1e-6)
    assert injections.kl[0] == pytest.approx(0, abs=1e-6)
    assert min(*exits.kl[:-1], *injections.kl[1:]) > 1e-4

    other = tiny_llava(backbone)
    rows, last = range(len(ROWS)), [c for (c,) in last_columns(inputs)]
    with torch.no_grad():
        full = other(**inputs, use_cache=False).logits[rows, last].log_softmax(-1)
    for schedule, kl in (("exit=2", exits.kl[1]), ("inject=3", injections.kl[3])):
        hidrop.compile(other, schedule, backend="eager")
        with torch.no_grad():
            found = other(**inputs, use_cache=False).logits[rows, last].log_softmax(-1)
        expected = float((full.exp() * (full - found)).sum(-1).mean())
        assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_accuracy_is_the_share_of_samples_with_every_supervised_token_right(plain: Any) -> None:
    model = plain("llama")
    inputs = batch(model, ROWS, padding="left", seed=2)
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = best[:, -3:-1]
    # Nothing predicts a row's first token.
    labels[2, -3] = 50
    wrong = labels.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 50
    for given, expected in ((labels, 1.0), (wrong, 2 / 3)):
        samples = prepare_samples(model, [{**inputs, "labels": given}])
        trials = Trials(model, samples, measure_layers(model, samples)[1])
        assert trials.run("identity").accuracy == pytest.approx(expected)


def test_sweeping_another_count_reuses_the_program_and_is_right(plain: Any) -> None:
    model = plain("llama")
    samples = prepare_samples(model, [batch(model, ROWS, seed=2)])
    reference = measure_layers(model, samples)[1]
    shared = Trials(model, samples, reference)
    found = [shared.run(f"inject=1,prune=1:{n}+2:2,exit=3").kl for n in (9, 6, 3)]
    assert len(shared._programs) == 1
    alone = [
        Trials(model, samples, reference).run(f"inject=1,prune=1:{n}+2:2,exit=3").kl
        for n in (9, 6, 3)
    ]
    assert found == alone
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("reads=0", "reads=1"),
        ("reads=0", "reads=0,freeze_system=true"),
        ("inject=1,prune=1:4", "inject=1,prune=1:4,score=all_text"),
        ("prune=1:4", "prune=1:4,before=divprune(ratio=0.5)"),
    ],
)
def test_schedules_of_other_rules_share_no_program(one: str, other: str, plain: Any) -> None:
    model = plain("llama")
    samples = prepare_samples(model, [batch(model, ROWS, seed=2)])
    reference = measure_layers(model, samples)[1]
    trials = Trials(model, samples, reference)
    first, second = trials.run(one).kl, trials.run(other).kl
    assert len(trials._programs) == 2
    assert second == Trials(model, samples, reference).run(other).kl != first


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    model = tiny_llava("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InputError, match=r"no numbers, in torch\.float32.*Load it in bfloat16"):
        hidrop.calibrate(model, [batch(model, ROWS)], progress=False)


def test_a_part_of_a_batch_is_measured_as_in_the_batch(plain: Any) -> None:
    model = plain("llama")
    whole = prepare_samples(model, [batch(model, ROWS, seed=2)])
    full = measure_layers(model, whole)[1]
    expected = Trials(model, whole, full).run("inject=1,prune=2:4").kl
    part = [whole[0].take([1, 2])]
    found = Trials(model, part, [full[0][1:]]).run("inject=1,prune=2:4").kl
    assert found == pytest.approx(expected[1:], rel=1e-4, abs=1e-8)  # fp32, of KLs near 1e-7


# What cannot be measured.


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda m: [], "batches is empty"),
        (lambda m: [batch(m, [[5, 6, 7]])], "none of the 1 calibration samples has an image"),
        (lambda m: batch(m, ROWS), "wrap a single one in a list"),
        (lambda m: [{"pixel_values": torch.zeros(1)}], "no input_ids"),
        (
            lambda m: [{k: v for k, v in batch(m, ROWS).items() if k != "pixel_values"}],
            "27 image placeholder tokens but no pixel_values",
        ),
        (
            lambda m: [{**batch(m, ROWS), "pixel_values": torch.zeros(2, 3, 12, 12)}],
            "batch 0: the prompt has 27 image placeholder tokens",
        ),
        (
            lambda m: [batch(m, ROWS), {**batch(m, ROWS), "labels": batch(m, ROWS)["input_ids"]}],
            "batch 1 has labels and batch 0 has none",
        ),
        (
            lambda m: [{**batch(m, ROWS), "labels": torch.full((3, 20), -100)}],
            "row 0 of batch 0 has labels but none",
        ),
        (lambda m: [{**batch(m, ROWS), "attention_mask": torch.ones(3, 4)}], r"attention_mask has"),
    ],
)
def test_bad_batches_are_refused_by_number(batches: Any, message: str, plain: Any) -> None:
    model = plain("llama")
    with pytest.raises(InputError, match=message):
        prepare_samples(model, batches(model))


def test_text_only_rows_count_for_text_alone(plain: Any) -> None:
    model = plain("llama")
    with_image = batch(model, [ROWS[0]])
    text_only = batch(model, [[5, 6, 7, 8]])
    alone, _ = measure_layers(model, prepare_samples(model, [with_image]))
    both, _ = measure_layers(model, prepare_samples(model, [with_image, text_only]))
    assert both.attention_mass == alone.attention_mass
    assert both.vision_similarity == alone.vision_similarity
    assert both.influence == alone.influence
    assert both.text_similarity != alone.text_similarity


def test_a_reference_of_another_size_is_stretched() -> None:
    reference = torch.arange(6.0)[:, None]
    assert as_reference(reference, 6) is reference
    assert as_reference(reference, 3).flatten().tolist() == [1, 3, 5]
    assert as_reference(reference, 12).flatten().tolist() == [k // 2 for k in range(12)]
    assert math.isfinite(float(as_reference(reference, 7).sum()))
