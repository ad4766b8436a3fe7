"""Published methods by name: their fields, their errors, and what they keep, held against a loop written from their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import Schedule, ScheduleError
from hidrop_fx.cli.methods_command import methods
from hidrop_fx.methods import METHODS
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.reference import reference_generate, reference_rows
from tests.support.runtimes import compiled_eagerly, runtime_in

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]
LAYERS = 6
SMALL = {
    "divprune": "divprune(ratio=0.4)",
    "cdpruner": "cdpruner(keep=4)",
    "pooling": "pooling(keep=4)",
    "visionzip": "visionzip(dominant=3,contextual=2)",
    "duet": "duet(dominant=3,contextual=2,layer=2,keep=2,exit=4)",
    "snapkv": "snapkv(window=2,capacity=9)",
    "pyramidkv": "pyramidkv(window=2,capacity=9)",
    "mixkv": "mixkv(window=2,capacity=9)",
    "index-preserving": "index-preserving",
    "ivc-prune": "ivc-prune(layer=3)",
    "fastv": "fastv(layer=2,keep=0.5)",
    "ppe": "ppe(ratio=0.3,copies=2)",
    "pyramiddrop": "pyramiddrop(layers=(1,3,4),keeps=(.5,.25,.125))",
    "random": "random(layers=(2,),keeps=(4,))",
    "sparsevlm": "sparsevlm(layers=(2,3,5),keeps=(6,4,2))",
    "v2drop": "v2drop(layers=(1,3,5),keeps=(.5,.25,1))",
    "twigvlm": "twigvlm(layer=1,average=4,exit=5)",
    "vica": "vica(layers=(0,2,5))",
    "voco": "voco(token_id=8)",
    "vtw": "vtw(layer=3)",
}
"""Each method for six layers."""
each_method = pytest.mark.parametrize("name", METHODS)
ON_LLAVA = [name for name in METHODS if name not in ("random", "index-preserving", "ppe")]
"""Those that a LLaVA runs, alike each time; the others have tests of their own."""
IN_THE_DECODER = [
    n
    for n in ON_LLAVA
    if n not in ("sparsevlm", "twigvlm", "vica", "voco")
    and not {Schedule.preset(n).before, Schedule.preset(n).cache} - {None}
]
"""Those that the reference knows; the other stages are held against authors' rules in `test_reducers` and `test_cache_cuts`,
frozen vision tokens in `test_frozen_vision`, recycled ones in `test_sparsevlm`, a side
branch in `test_twig`, masks by a token in `test_voco`."""


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2)


def modules_for(model: Any, schedule: Schedule) -> dict[str, Any]:
    """Make the modules that a schedule reads."""
    layer = min(schedule.prune, default=0)
    return {name: hidrop.grow_twig(model, 2, layer=layer) for name in schedule.modules}


def test_every_method_is_tried_here() -> None:
    assert set(SMALL) == set(METHODS)


@each_method
def test_a_method_is_a_schedule_in_every_form(name: str, tmp_path: Path) -> None:
    schedule = Schedule.parse(SMALL[name], LAYERS)
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.parse(name) == Schedule.preset(name) == Schedule.preset(name, 32)
    (tmp_path / "s.json").write_text(schedule.to_json())
    assert Schedule.parse(str(tmp_path / "s.json")) == schedule


def test_the_defaults_are_the_authors() -> None:
    shares = {8: 0.5, 16: 0.25, 24: 0.125}
    assert Schedule.preset("fastv").prune == {2: 0.5}
    assert Schedule.preset("pyramiddrop") == Schedule(
        prune=shares, positions="compact", rounding="floor"
    )
    assert Schedule.preset("vtw") == Schedule(exit=15)
    assert Schedule.preset("snapkv", variant="mixkv") == Schedule.preset("mixkv", variant="mixkv")
    assert Schedule.preset("v2drop").prune == {3: 0.5, 17: 0.25, 22: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv(layr=2)", "layr.*write fastv"),
        ("fastv(2)", "cannot read '2'"),
        ("fastv(layer=two)", "cannot read 'layer=two'"),
        ("fastv(layer=2", "cannot read"),
        ("fastv(layer=0)", "needs 'previous_key' of the layer before prune layer 0"),
        ("fastv(keep=0)", "keep 0 at prune layer 2"),
        ("fastv(keep=1.5)", "keep 1.5 at prune layer 2"),
        ("nobody(a=1)", "no preset 'nobody': choose one of .*fastv"),
        ("hidrop-64(a=1)", "'hidrop-64' takes no arguments, and was given a"),
        ("v2drop(layers=(1,),keeps=(1,2))", "give one keep for each layer"),
        ("v2drop(layers=3,keeps=(1,))", "layers=3 is no list"),
        ("pyramiddrop(layers=(4,4),keeps=(2,1))", "names a layer twice"),
        ("vtw(layer=40)", "exit=40 but the model has 6 layers"),
        ("fastv(layer=[2])", r"filter layer \[2\] is a list: use an integer >= 0"),
        ("duet(layer={})", r"filter layer {} is a dict: use an integer >= 0"),
        ("pyramiddrop(layers=([1],),keeps=(1,))", r"filter layer \[1\] is a list"),
        ("pyramiddrop(layers=(),keeps=())", r"layers=\(\) names no filter layer: name one"),
        ("sparsevlm(retain=[192])", r"retain=\[192\]; use one of 192, 128, 96, 64, or give keeps"),
        ("vtw(layer=None)", "layer=None would do nothing at all: give a value"),
        ("voco(token_id=None)", "token_id=None would do nothing at all"),
        ("vica(layers=None,freeze_system=False)", "layers=None would do nothing at all"),
        ("twigvlm(average=None)", "average=None would do nothing at all"),
        ("vtw(layer=0)", r"^vtw\(layer=0\): exit=0 is too small: use an integer >= 1"),
        ("cdpruner(keep=0)", r"^cdpruner\(keep=0\): before=.*tokens=0 is not a number of tokens"),
        ("divprune(ratio=True)", "ratio=True is not a share of the tokens"),
        ("cdpruner(relevance=False)", "relevance=False is not a weight"),
        ("snapkv(variant='mix')", "variant='mix'; use one of 'attn', 'mixkv', 'headwisemixkv'"),
        ("snapkv(32)", r'cannot read \'32\' .* by name, .* as in "fastv\(layer=2,keep=0.5\)"'),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text, LAYERS)


@each_method
def test_numpys_numbers_are_as_good_as_pythons(name: str) -> None:
    def in_numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return [in_numpy(each) for each in value]
        made = {int: np.int64, float: np.float32, str: np.str_}
        return made.get(type(value), lambda same: same)(value)

    defaults = {p.name: p.default for p in METHODS[name].signature.parameters.values()}
    schedule = Schedule.preset(name, **{key: in_numpy(v) for key, v in defaults.items()})
    assert schedule == Schedule.preset(name)
    assert Schedule.parse(str(schedule)) == Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("tokens", "fastv", "pyramiddrop"),
    [(25, 12, 12), (27, 14, 13), (9, 4, 4), (11, 6, 5), (576, 288, 288)],
)
def test_shares_are_rounded_as_the_authors_round(tokens: int, fastv: int, pyramiddrop: int) -> None:
    """FastV by Python's round, whose halves are even; PyramidDrop by int()."""
    assert Schedule.preset("fastv").keep_counts(tokens) == {2: fastv}
    assert Schedule.preset("pyramiddrop").keep_counts(tokens)[8] == pyramiddrop


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", IN_THE_DECODER)
def test_a_method_generates_what_the_reference_generates(
    name: str, padding: Any, llava: Any
) -> None:
    schedule = Schedule.parse(SMALL[name], LAYERS)
    inputs = batch(llava, ROWS, padding=padding)
    expected = reference_generate(llava, schedule, inputs, 5)
    rows = reference_rows(llava, schedule, inputs)
    with compiled_eagerly(llava, schedule):
        found = llava.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        layout = runtime_in(llava).last_layout
        assert layout is not None
        seen = [layer.query for layer in layout.plan.layers]
        assert [layout.counts[s] for s in seen] == [
            list(tokens) for tokens in zip(*(row.tokens for row in rows), strict=True)
        ]
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected


def test_fastv_keeps_what_its_own_code_keeps(llava: Any) -> None:
    """Its rule from the layer's own attention weights, as HF returns them: last row of layer K - 1, mean over heads."""
    hf = tiny_llava("llama", num_layers=LAYERS, kv_heads=2, attn="eager")
    inputs = batch(hf, [ROWS[0]])
    with torch.no_grad():
        weights: Tensor = hf(**inputs, output_attentions=True).attentions[1]
    places = inputs["input_ids"][0].eq(hf.config.image_token_id).nonzero().flatten()
    score = weights[0].mean(dim=0)[-1][places]
    best = sorted(places[score.topk(round(len(places) * 0.5)).indices].tolist())
    (row,) = reference_rows(llava, Schedule.preset("fastv"), inputs)
    assert row.kept == {2: best}
    with compiled_eagerly(llava, Schedule.preset("fastv")):
        assert hidrop.compare(llava, **inputs).ok


@pytest.mark.parametrize("name", ON_LLAVA)
def test_a_method_equals_the_plain_loop(name: str, llava: Any) -> None:
    schedule = Schedule.parse(SMALL[name], LAYERS)
    inputs = batch(llava, ROWS)
    with compiled_eagerly(llava, schedule, modules=modules_for(llava, schedule)):
        report = hidrop.compare(llava, **inputs)
    assert report.ok, str(report)


def test_the_page_of_methods_shows_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    methods()
    shown = capsys.readouterr().out.strip()
    assert len(shown.splitlines()) == 2 + len(METHODS)
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert shown in page, "write what `hidrop methods` prints into docs/methods.md"


def generated(model: Any, schedule: Schedule, **options: Any) -> list[list[int]]:
    inputs = batch(model, ROWS, padding="left")
    hidrop.compile(model, schedule, modules=modules_for(model, schedule), **options)
    try:
        found = [
            model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            for _ in range(2)  # the second replays what the first has recorded
        ]
    finally:
        hidrop.restore(model)
    assert found[0].tolist() == found[1].tolist()
    return list(found[0].tolist())


@pytest.mark.parametrize("name", ON_LLAVA)
def test_recorded_graphs_generate_the_same(name: str, llava: Any) -> None:
    schedule = Schedule.parse(SMALL[name], LAYERS)
    plain = generated(llava, schedule, backend="eager")
    assert generated(llava, schedule, backend="eager", cuda_graphs=True) == plain


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ON_LLAVA)
def test_compilers_generate_the_same(name: str, backend: str, llava: Any) -> None:
    schedule = Schedule.parse(SMALL[name], LAYERS)
    plain = generated(llava, schedule, backend="eager")
    assert generated(llava, schedule, backend=backend) == plain
