"""`inspect` tells what the last call did, in numbers that agree with the cache and the plan."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.inspection import Inspection, inspect, measure
from hidrop_fx.inspection.compile_progress import Progress, watching
from hidrop_fx.inspection.report.programs import bodies_of
from hidrop_fx.inspection.report.ranges import runs
from hidrop_fx.inspection.table import amount, ratio, size
from hidrop_fx.inspection.timing import kv_bytes
from tests.support.models import IMAGE, Row, batch, random_labels, tiny_llava
from tests.support.runtimes import runtime_in

torch.set_num_threads(1)

SCHEDULE = "inject=1,prune=2:4,exit=5"
LAYERS = 6
ONE: list[Row] = [[5, 6, IMAGE, 7]]
RAGGED: list[Row] = [[8, 9], [5, IMAGE, 6, IMAGE, 7]]


@pytest.fixture(scope="module")
def model() -> Any:
    """A compiled model that was called once, on one row."""
    made = hidrop.compile(tiny_llava(num_layers=LAYERS), SCHEDULE, backend="eager")
    generate_three(made, ONE)
    return made


def generate_three(model: Any, rows: Any, **options: Any) -> Any:
    return model.generate(
        **batch(model, rows),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(hidrop.HidropError, match=r"not compiled.*hidrop_fx\.compile"):
        inspect(tiny_llava())


def test_inspect_before_any_call_shows_the_plan() -> None:
    report = inspect(hidrop.compile(tiny_llava(num_layers=LAYERS), SCHEDULE, backend="eager"))
    assert not report.called
    assert report.layers == ()
    assert report.plan.tokens[0] == report.plan.text_tokens
    text = str(report)
    assert "No call yet" in text
    assert SCHEDULE in text
    assert "identity" in text
    json.dumps(report.to_dict())


def test_inspect_lists_the_layers_of_one_row(model: Any) -> None:
    report = inspect(model)
    assert [layer.segment for layer in report.layers] == [
        *("text", "inject 1", "prune 2", "prune 2", "prune 2", "exit 5")
    ]
    assert [layer.tokens for layer in report.layers] == [3, 12, 7, 7, 7, 3]
    assert [layer.vision_tokens for layer in report.layers] == [0, 9, 4, 4, 4, 0]
    assert [layer.kv_length for layer in report.layers] == [3, 12, 7, 7, 7, 3]
    assert report.row == 0
    assert (report.text_tokens, report.vision_tokens, report.images) == ((3,), (9,), (1,))


def test_regions_are_the_models_own_layers(model: Any) -> None:
    modules = dict(model.named_modules())
    for layer in inspect(model).layers:
        assert modules[layer.region] is model.get_decoder().layers[layer.layer]


def test_layer_flops_add_up_to_the_plans(model: Any) -> None:
    report = inspect(model)
    g = report.plan.geometry
    head = 2 * g.hidden_size * g.vocab_size
    assert sum(layer.flops for layer in report.layers) + head == report.plan.flops
    # A filter layer costs more than a layer that runs on the same tokens.
    assert report.layers[2].flops > report.layers[3].flops == report.layers[4].flops
    assert report.layers[0].flops == report.layers[5].flops


def test_inspect_totals_are_relative_to_the_identity(model: Any) -> None:
    report = inspect(model)
    assert report.totals is not None
    assert report.identity is not None
    assert report.totals.token_layers == 39
    assert report.identity.token_layers == 12 * LAYERS
    assert report.totals.flops == report.plan.flops
    assert report.identity.flops == report.plan.identity.flops
    assert report.identity.kv_bytes == 12 * LAYERS * 2 * 32 * 4
    assert ratio(report.identity.kv_bytes, report.totals.kv_bytes) in str(report)


@pytest.mark.parametrize(
    "schedule",
    [
        "identity",
        "inject=2",
        "prune=0:0.5,exit=4",
        "inject=2,prune=2:3+3:3",
        "prune=1:100,exit=4",
        "inject=1,prune=2:5,exit=3,positions=compact",
        "positions=group",
    ],
)
def test_tokens_are_what_the_cache_holds_and_the_plan_says(schedule: str) -> None:
    compiled = hidrop.compile(tiny_llava(), schedule, backend="eager")
    found = generate_three(compiled, ONE)
    report = inspect(compiled)
    new = 2
    held = [found.past_key_values.get_seq_length(k) - new for k in range(4)]
    assert [layer.kv_length for layer in report.layers] == held
    assert tuple(layer.tokens for layer in report.layers) == report.plan.tokens
    assert tuple(layer.vision_tokens for layer in report.layers) == report.plan.vision_tokens


def test_inspect_of_a_batch_shows_one_row_and_sums_all() -> None:
    compiled = hidrop.compile(tiny_llava(num_layers=LAYERS), SCHEDULE, backend="eager")
    found = generate_three(compiled, RAGGED)
    report = inspect(compiled)
    assert report.text_tokens == (2, 3)
    assert report.vision_tokens == (0, 18)
    assert report.images == (0, 2)
    assert [layer.tokens for layer in report.layers] == [2] * LAYERS
    held = [found.past_key_values.get_seq_length(k) - 2 for k in range(LAYERS)]
    assert [layer.kv_length for layer in report.layers] == held == [3, 21, 11, 11, 11, 3]
    assert report.totals is not None
    assert report.totals.token_layers == 2 * LAYERS + sum(held)
    assert report.cache_bytes == found.past_key_values.nbytes
    text = str(report)
    assert "row 0 of 2 rows" in text
    assert "Totals of all 2 rows" in text
    assert "2+0, 3+18" in text


def test_inspect_of_training_has_no_cache() -> None:
    compiled = hidrop.compile(tiny_llava(num_layers=LAYERS), SCHEDULE, backend="eager")
    inputs = batch(compiled, ONE)
    compiled(**inputs, labels=random_labels(inputs))
    report = inspect(compiled)
    assert [layer.kv_length for layer in report.layers] == [None] * LAYERS
    assert report.cache_bytes is None
    assert "no KV cache" in str(report)


@pytest.mark.parametrize("rank", ["hard", "soft"])
def test_learned_ratios_are_counted_as_they_ran(rank: str) -> None:
    schedule = f"inject=1,prune=2:6+3:3,exit=5,selection=dtopk,rank={rank},budget_weight=0.5"
    compiled = hidrop.compile(tiny_llava(num_layers=LAYERS), schedule, backend="eager")
    compiled.hidrop_ratios.values.data.copy_(torch.tensor([5 / 9, 0.5]))
    generate_three(compiled, [*RAGGED, *ONE])
    report = inspect(compiled)
    assert report.totals is not None
    # Text aside: 18, 8, 4 tokens of the row with two images, 9, 4, 2 of that with one.
    text = (2 + 3 + 3) * LAYERS
    assert report.totals.token_layers == text + (18 + 8 + 4 + 4) + (9 + 4 + 2 + 2)
    head = 2 * report.plan.geometry.hidden_size * report.plan.geometry.vocab_size
    assert sum(layer.flops for layer in report.layers) + head == report.plan.flops
    assert f"selection=dtopk,rank={rank}" in str(report) or rank == "hard"


def test_every_layer_is_served_by_one_prefill_body(model: Any) -> None:
    runtime = runtime_in(model)
    served = Counter(name for body in bodies_of(runtime) for name in set(body.used_by))
    assert served == {
        **{f"prefill layer_{k}": 1 for k in range(LAYERS)},
        "prefill keys_2": 1,
        "decode": 1,
    }
    serves = {body.serves for body in inspect(model).bodies}
    assert "prefill layers 0-1, 3-5" in serves
    assert "prefill keys 2" in serves


def test_programs_for_ragged_batches_are_told_apart() -> None:
    compiled = hidrop.compile(tiny_llava(), "inject=1", backend="eager")
    generate_three(compiled, ONE)
    generate_three(compiled, RAGGED)
    serves = [body.serves for body in inspect(compiled).bodies]
    assert {"decode", "decode, masked"} <= set(serves)


def test_inspect_lists_captures_and_fallbacks(model: Any) -> None:
    runtime = runtime_in(model)
    assert len(inspect(model).captures) == 1
    assert "Fallbacks" not in str(inspect(model))
    runtime.programs.log.fallbacks.append("body 7 runs uncompiled: <reason>")
    try:
        report = inspect(model)
    finally:
        runtime.programs.log.fallbacks.clear()
    assert report.fallbacks == ("body 7 runs uncompiled: <reason>",)
    assert "body 7 runs uncompiled: <reason>" in str(report)
    assert "&lt;reason&gt;" in report._repr_html_()


def test_inspection_does_not_change_after_later_calls(model: Any) -> None:
    report = inspect(model)
    before = str(report)
    generate_three(model, RAGGED)
    assert str(report) == before
    assert inspect(model).images == (0, 2)
    generate_three(model, ONE)


def test_inspection_is_written_as_json_and_html(model: Any) -> None:
    report = inspect(model)
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data) == set(Inspection.__dataclass_fields__) | {
        "called",
        "compile_seconds",
    }
    assert data["layers"][1] == {
        "layer": 1,
        "region": "model.language_model.layers.1",
        "segment": "inject 1",
        "tokens": 12,
        "vision_tokens": 9,
        "kv_length": 12,
        "flops": report.layers[1].flops,
        "kv_bytes": 12 * 2 * 32 * 4,
        "inserted": "inject 5",
    }
    html = report._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 4
    assert "<td>inject 1</td>" in html


def test_inspection_text_is_aligned_and_plain(model: Any) -> None:
    text = str(inspect(model))
    rows = [line for line in text.splitlines() if "language_model.layers" in line]
    assert len(rows) == LAYERS
    assert len({len(row) for row in rows}) == 1
    assert "\x1b" not in text


def test_progress_prints_compilations(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    compiled: Any = hidrop.compile(tiny_llava(num_layers=2), "inject=1", backend="aot_eager")
    with Progress(lines=True) as tell, watching(compiled, tell):
        compiled.generate(**batch(compiled, ONE), max_new_tokens=1)
    runtime = runtime_in(compiled)
    assert runtime.programs.log.listener is None
    report = inspect(compiled)
    assert len(report.compiled) == len(report.bodies) == 1
    assert report.compile_seconds == report.compiled[0].seconds > 0
    assert "prefill layer body 1" in str(report)
    printed = capsys.readouterr()
    assert printed.out == ""
    before, after = printed.err.splitlines()
    assert before == "compiling prefill body 1/1 ..."
    assert after.startswith("prefill body 1/1 compiled in ")


def test_progress_without_lines_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(lines=False) as tell:
        tell("something")
    assert capsys.readouterr() == ("", "")


def test_watching_a_plain_model_does_nothing() -> None:
    with watching(tiny_llava(), pytest.fail):
        pass


def test_measure_times_plain_and_compiled_alike() -> None:
    model = tiny_llava(num_layers=LAYERS)
    inputs = batch(model, ONE)
    plain = measure(model, inputs, new_tokens=4, repeats=1)
    ours = measure(
        hidrop.compile(model, SCHEDULE, backend="eager"), inputs, new_tokens=None, repeats=1
    )
    token = 2 * 32 * 4
    assert plain.kv_bytes == 12 * LAYERS * token
    # Every buffer has room for the token that comes next, and one place that stays free.
    assert 39 * token < ours.kv_bytes <= (39 + 2 * LAYERS) * token
    assert plain.first_token_seconds > 0
    assert plain.decode_tokens_per_second is not None
    assert plain.decode_tokens_per_second > 0
    assert ours.decode_tokens_per_second is None
    assert set(ours.to_dict()) == {*("first_token_seconds", "decode_tokens_per_second", "kv_bytes")}
    cache = generate_three(model, ONE).past_key_values
    assert kv_bytes(cache) == cache.nbytes


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], []), ([5], [(0, 0, 5)]), ([5, 5, 7, 5], [(0, 1, 5), (2, 2, 7), (3, 3, 5)])],
)
def test_equal_neighbours_are_joined_into_runs(
    values: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert runs(values) == expected


def test_numbers_print_with_units() -> None:
    assert [amount(n) for n in (0, 999, 1234, 56_780, 8.4e12)] == [
        *("0", "999", "1.23 k", "56.8 k", "8.40 T")
    ]
    assert [size(n) for n in (0, 1536, 3 * 2**30)] == ["0 B", "1.5 KiB", "3.0 GiB"]
    assert ratio(3, 2) == "1.50x"
    assert ratio(3, 0) == "-"


def test_importing_the_package_loads_no_terminal_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import torch, transformers;"
        "import transformers.models.llava.modeling_llava;"
        "before = set(sys.modules); import hidrop_fx, hidrop_fx.inspection;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new & {'typer', 'rich', 'PIL', 'matplotlib'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
