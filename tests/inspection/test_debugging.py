"""`history`, `compare`, `dump`, `replay`, `explain`: a broken pass is found, and what is right is not accused.

Over 400 lines: the tools are tested on the same broken passes, which stand at the top.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import passes
from hidrop_fx.inspection.comparison.layer_by_layer import compare
from hidrop_fx.inspection.dumps.stage_files import load_stage
from hidrop_fx.inspection.report.programs import programs_of
from hidrop_fx.ops import tokens
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.captures import capture_model
from hidrop_fx.runtime.fingerprint import fingerprint
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.paths import ROOT
from tests.support.runtimes import runtime_in

SCHEDULE = "inject=1,prune=2:4,exit=4"
LAYERS = 5
ROWS: Any = [[5, 6, IMAGE, 7], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]


_CAPTURES: dict[Any, Any] = {}


def compiled_from_one_capture(
    schedule: str = SCHEDULE, backbone: str = "llama", **options: Any
) -> Any:
    """A compiled model; its decoder is captured once for all schedules and faults."""
    key = (backbone, *sorted(options.items()))
    if key not in _CAPTURES:
        model = tiny_llava(backbone, num_layers=LAYERS, **options)
        _CAPTURES[key] = model, capture_model(model)
    model, captured = _CAPTURES[key]
    hidrop.compile(model, schedule, backend="eager")
    runtime = runtime_in(model)
    runtime.programs.store.captures[fingerprint(model.get_decoder())] = captured
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    found = hidrop.compile(tiny_llava(num_layers=LAYERS), SCHEDULE, backend="eager")
    found.generate(**batch(found, ROWS), max_new_tokens=2, do_sample=False)
    return found


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return batch(model, ROWS)


@pytest.fixture(scope="module")
def dumped(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hidrop.dump(model, tmp_path_factory.mktemp("dump") / "here")


def program(model: Any, name: str = "prefill") -> Program:
    runtime = runtime_in(model)
    return programs_of(runtime)[name].program


# history


def test_a_stage_is_python_with_shapes_and_the_pass_of_each_line(model: Any) -> None:
    history = program(model).history
    text = str(history[3])
    compile(text, "stage", "exec")
    assert "# layer 2 (layers.2): tokens of prune_2" in text
    assert "self.layers[2].self_attn.q_proj.weight)  # f32[batch, prune_2, 32]" in text
    (line,) = [x for x in text.splitlines() if "tokens.surviving_columns(" in x]
    assert line.endswith("# i64[batch, prune_2] <- prune")
    assert "<- prune" not in str(history[2])


def test_history_prints_a_line_a_stage(model: Any) -> None:
    lines = str(program(model).history).splitlines()
    assert len(lines) == 9
    assert "3  prune: 1 matched" in lines[3]


def test_history_diff_shows_what_one_pass_changed(model: Any) -> None:
    history = program(model).history
    changed = history.diff("inject", "prune")
    assert "+    surviving_columns = tokens.surviving_columns(" in changed
    assert changed == history.diff(2, 3)
    assert history.diff("positions", "positions") == ""
    assert "merge_tokens" not in "".join(x for x in changed.splitlines() if x[0] in "+-")
    with pytest.raises(KeyError, match=r"no stage 'fuse'.*captured, split_streams"):
        history.diff(0, "fuse")


def test_shapes_of_a_graph_that_cannot_run_are_left_out(model: Any) -> None:
    broken = Program(program(model).captured, program(model).plan, "train")

    def cut(program: Program, plan: Plan) -> PassResult:
        linear = next(n for n in program.regions[0].nodes if "linear" in n.name)
        linear.args = (linear.args[1], linear.args[0])
        return PassResult(matched=1)

    broken.apply(cut)
    assert "linear = aten.linear.default(self.layers[0]" in str(broken.history[-1])


# A broken pass is found.


def worst_first(
    scores: Tensor, columns: Tensor, is_vision: Tensor, keep: Tensor, slots: Tensor
) -> Tensor:
    return _surviving(-scores, columns, is_vision, keep, slots)


_surviving = tokens.surviving_columns


def hotter_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale * 1.5
    )


def break_prune(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokens, "surviving_columns", worst_first)


def break_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(passes, "attention", _faulty_when_fused(passes.attention))


def break_inject(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokens, "merge_index", backwards)


def backwards(text_columns: Tensor, vision_columns: Tensor, slots: Tensor) -> Tensor:
    """Text after vision, whatever their columns."""
    both = torch.cat([text_columns + 1000, vision_columns], dim=1)
    return both.argsort(dim=1, stable=True)[:, : len(slots)]


@pytest.mark.parametrize(
    ("fault", "at_pass", "at_layer"),
    [
        (break_prune, "prune", "layers.2"),
        (break_attention, "attention", "layers.3"),
        (break_inject, "inject", "layers.1"),
    ],
)
def test_compare_finds_a_broken_pass(
    fault: Callable[[pytest.MonkeyPatch], None],
    at_pass: str,
    at_layer: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fault(monkeypatch)
    model = compiled_from_one_capture()
    inputs = batch(model, ROWS)
    compared = compare(model, **inputs)
    assert not compared.ok
    assert compared.first is not None
    assert compared.first.region == at_layer
    assert f"{at_layer} is the first to depart" in str(compared)
    replayed = hidrop.replay(hidrop.dump(model, tmp_path), model, **inputs)
    assert replayed.first is not None
    assert replayed.first.name == at_pass
    assert replayed.first.first is not None
    assert replayed.first.first.region == at_layer
    assert f"{at_pass} is at fault: {at_layer}" in str(replayed)
    json.dumps([compared.to_dict(), replayed.to_dict()])


def test_compare_without_the_faulty_pass_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_attention(monkeypatch)
    model = compiled_from_one_capture()
    inputs = batch(model, ROWS)
    assert not compare(model, **inputs).ok
    assert compare(model, disable=("attention",), **inputs).ok
    assert not compare(model, disable=("kv_cache", "head"), **inputs).ok
    assert compare(model, reference="program", **inputs).ok


def _faulty_when_fused(original: Any) -> Any:
    @functools.wraps(original)
    def attention(program: Program, plan: Plan, *, fused: bool = True) -> PassResult:
        result: PassResult = original(program, plan, fused=fused)
        if fused:
            program.regions[3].attention.target = hotter_attention
        return result

    return attention


# What is right is not accused.


@pytest.mark.parametrize(
    ("backbone", "schedule", "options"),
    [
        ("llama", "identity", {}),
        ("llama", "inject=2,prune=2:3+3:1,positions=compact", {}),
        ("qwen2", "prune=1:0.5,exit=3,positions=group", {"sliding_window": 6}),
    ],
)
def test_compare_passes_a_right_program(
    backbone: str, schedule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = compiled_from_one_capture(schedule, backbone, **options)
    inputs = batch(model, ROWS)
    model(**inputs)
    found = compare(model, **inputs)
    assert found.ok, str(found)
    assert found.reference == ("transformers" if schedule == "identity" else "loop")
    assert [layer.layer for layer in found.layers] == [*range(LAYERS), None]
    assert hidrop.replay(hidrop.dump(model, tmp_path), model, **inputs).ok
    assert hidrop.is_compiled(model)


def test_compare_takes_whole_programs(model: Any, inputs: dict[str, Tensor]) -> None:
    found = compare(model, lowering="whole", **inputs)
    assert found.ok
    assert found.lowering == "whole"


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"disable": ("prune",)}, "pass 'prune' cannot be disabled; .* attention, head, kv_cache"),
        ({"backend": "tvm"}, "backend='tvm'; use one of inductor"),
        ({"lowering": "half"}, "lowering='half'; use one of bodies, whole"),
        ({"reference": "truth"}, "reference='truth'; use one of auto, loop"),
        ({"reference": "transformers"}, "fits the identity schedule alone"),
    ],
)
def test_compare_refuses_switches_that_do_not_exist(
    switches: dict[str, Any], message: str, model: Any, inputs: dict[str, Tensor]
) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        compare(model, **switches, **inputs)


@pytest.mark.parametrize("call", [hidrop.compare, hidrop.explain])
def test_a_plain_model_is_refused(call: Any, plain: Any) -> None:
    with pytest.raises(hidrop.HidropError, match="not compiled"):
        call(plain(), input_ids=torch.tensor([[5]]))
    with pytest.raises(hidrop.HidropError, match="not compiled"):
        hidrop.dump(plain(), "nowhere")


# dump and replay


def test_dump_holds_every_stage_and_no_weights(dumped: Path, model: Any) -> None:
    names = {str(p.relative_to(dumped)) for p in dumped.rglob("*") if p.is_file()}
    stages = [s.name for s in program(model).history]
    for index, name in enumerate(stages):
        assert f"prefill/{index:02d}_{name}.py" in names
        assert (f"prefill/{index:02d}_{name}.diff" in names) == (index > 0)
    assert {"README.txt", "report.html", "schedule.json", "plan.json", "versions.json"} <= names
    assert {"inspection.json", "inspection.txt", "prefill/graph.json"} <= names
    assert sum((dumped / name).stat().st_size for name in names) < 1_500_000
    assert not any(name.endswith((".pt", ".bin", ".safetensors")) for name in names)
    home = str(Path(torch.__file__).parents[1])
    assert not any(home in (dumped / name).read_text() for name in names)


def test_dump_shows_what_inductor_generated(tmp_path: Path) -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "exit=1")
    with torch.no_grad():
        model(**batch(model, [[5, IMAGE, 7]]), use_cache=True, logits_to_keep=1)
    directory = hidrop.dump(model, tmp_path)
    (code,) = (directory / "output_code").iterdir()
    (body,) = hidrop.inspect(model).bodies
    assert (body.name, body.serves) == ("prefill layer body 1", "prefill layers 0-1")
    assert code.name == "prefill_layer_body_1.py"
    compile(code.read_text(), code.name, "exec")
    assert "async_compile" in code.read_text()
    hidrop.compile(model, "exit=1", backend="eager")
    hidrop.dump(model, directory)
    assert not (directory / "output_code").exists()  # of an earlier dump, of other programs


def test_dumped_graph_json_names_the_pass_of_each_node(dumped: Path) -> None:
    graph = json.loads((dumped / "prefill" / "graph.json").read_text())
    nodes = {node["name"]: node for node in graph["nodes"]}
    assert nodes["surviving_columns"]["pass"] == "prune"
    assert nodes["surviving_columns"]["shape"] == "i64[batch, prune_2]"
    own = next(n for n in graph["nodes"] if n["module"] == "layers.3.mlp.up_proj")
    assert (own["pass"], own["layer"]) == ("captured", 3)
    assert [p["name"] for p in graph["passes"]][:2] == ["captured", "split_streams"]


def test_replay_runs_a_dump_on_the_plain_model(dumped: Path, inputs: dict[str, Tensor]) -> None:
    found = hidrop.replay(dumped, tiny_llava(num_layers=LAYERS), **inputs)
    assert found.ok, str(found)
    assert len(found.stages) == 9


def test_replay_runs_an_edited_stage_as_edited(
    dumped: Path, model: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(dumped, tmp_path / "copy")
    path = copy / "prefill" / "05_positions.py"
    path.write_text(path.read_text().replace("aten.silu.default(", "aten.relu.default("))
    found = hidrop.replay(copy, model, **inputs)
    assert found.first is not None
    assert (found.first.name, found.first.first.layer) == ("positions", 0)  # type: ignore[union-attr]
    path.write_text(path.read_text().replace("aten.relu.default(", "aten.no_such.default("))
    found = hidrop.replay(copy, model, **inputs)
    assert found.first is not None
    assert "05_positions.py, line" in found.first.error
    assert "no_such" in found.first.error


def test_replay_runs_a_decode_program(
    dumped: Path, model: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    import shutil

    found = hidrop.replay(dumped, model, program="decode-masked", **inputs)
    assert found.ok, str(found)
    assert [stage.name for stage in found.stages] == ["kv_cache", "head"]
    assert [layer.layer for layer in found.stages[0].layers] == [*range(LAYERS), None]
    copy = shutil.copytree(dumped, tmp_path / "copy")
    path = next((copy / "decode-masked").glob("*_head.py"))
    text = path.read_text()
    assert "values_2, slots_prune_2," in text
    path.write_text(text.replace("values_2, slots_prune_2,", "values_2, slots_prune_2 - 1,"))
    found = hidrop.replay(copy, model, program="decode-masked", **inputs)
    assert found.first is not None
    assert (found.first.name, found.first.first.layer) == ("head", 2)  # type: ignore[union-attr]
    with pytest.raises(
        hidrop.HidropError, match="lead to the program 'decode', not 'decode-masked'"
    ):
        hidrop.replay(dumped, model, program="decode-masked", **batch(model, ROWS[:1]))
    plain = tiny_llava(num_layers=LAYERS)
    with pytest.raises(hidrop.HidropError, match="the model is not compiled; a decode program"):
        hidrop.replay(dumped, plain, program="decode-masked", **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"program": "train"}, "no program 'train'; it has decode-masked, prefill"),
    ],
)
def test_replay_error_names_the_stages_there_are(
    options: dict[str, str], message: str, dumped: Path, model: Any, inputs: dict[str, Tensor]
) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.replay(dumped, model, **options, **inputs)
    with pytest.raises(hidrop.HidropError, match="holds no program"):
        hidrop.replay(dumped / "prefill", model, **inputs)


def test_replay_refuses_a_file_that_is_no_stage(tmp_path: Path) -> None:
    path = tmp_path / "00_captured.py"
    path.write_text("x = 1")
    with pytest.raises(hidrop.HidropError, match="no `def forward`"):
        load_stage(path)


def test_dump_removes_the_stages_of_an_earlier_dump(model: Any, tmp_path: Path) -> None:
    stale = tmp_path / "train"
    stale.mkdir()
    (stale / "00_captured.py").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    hidrop.dump(model, tmp_path)
    assert not stale.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


SCRIPT = """
from tests.support.models import IMAGE, batch, tiny_llava
import hidrop_fx as hidrop
model = hidrop.compile(tiny_llava(), "prune=2:4", backend="eager").requires_grad_(False)
model(**batch(model, [[5, IMAGE, 7]]))
"""


def test_the_environment_asks_for_dumps_and_traces(tmp_path: Path) -> None:
    variables = {"HIDROP_DEBUG": str(tmp_path / "debug"), "TORCH_TRACE": str(tmp_path / "trace")}
    subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **variables},
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    folder = tmp_path / "debug" / "00_LlavaForConditionalGeneration"
    assert (folder / "prefill-all" / "03_prune.py").exists()
    assert (folder / "report.html").exists()
    trace = "".join(p.read_text() for p in (tmp_path / "trace").glob("*.log"))
    assert '"name":"hidrop_prefill_03_prune"' in trace.replace('": "', '":"')


def test_log_has_one_line_an_event(caplog: pytest.LogCaptureFixture) -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "exit=1", backend="eager")
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        model(**batch(model, ROWS))
    lines = [record.getMessage() for record in caplog.records if record.name == "hidrop_fx"]
    assert [line.split(" ")[0] for line in lines] == ["captured", "made"]
    assert not any("\n" in line for line in lines)


# explain


def test_explain_tells_streams_costs_and_problems(model: Any, inputs: dict[str, Tensor]) -> None:
    found = hidrop.explain(model, **inputs)
    width = inputs["input_ids"].shape[1]
    assert [row.text_tokens for row in found.rows] == [3, 5, 2]
    assert [row.vision_tokens for row in found.rows] == [9, 18, 0]
    assert found.rows[1].padding == "none"
    assert found.rows[2].text == f"{width - 2}-{width - 1}"
    assert found.rows[2].padding == f"0-{width - 3}"
    assert dict(found.segments) == {"0 text": 5, "1 inject": 23, "2 prune": 13, "4 exit": 5}
    assert found.compiles == ("nothing would be compiled: the backend is eager",)
    assert any("rows 2 have no image" in problem for problem in found.problems)
    assert not found.refused
    model(**inputs)
    totals = hidrop.inspect(model).totals
    assert totals is not None
    assert (found.flops, found.kv_bytes) == (totals.flops, totals.kv_bytes)
    json.dumps(found.to_dict())


def test_explain_runs_neither_tower_nor_decoder(model: Any, inputs: dict[str, Tensor]) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it ran")

    hooks = [model.model.vision_tower.register_forward_hook(refuse)]
    try:
        assert hidrop.explain(model, **inputs).rows
    finally:
        for hook in hooks:
            hook.remove()


def test_explain_counts_the_tokens_that_an_image_really_has(
    model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hidrop.explain(model, **inputs).to_dict()
    monkeypatch.setattr(
        model.config, "image_seq_length", 576
    )  # what configs say whatever the tower
    assert hidrop.explain(model, **inputs).to_dict() == expected


def test_explain_says_what_would_be_refused_and_what_is_idle(plain: Any) -> None:
    inputs = batch(plain(), [[5, IMAGE, 7]])
    found = hidrop.explain(plain(), schedule="prune=1:100,exit=3", **inputs)
    assert any("prune layer 1 keeps 100, which is every vision token" in p for p in found.problems)
    refused = hidrop.explain(plain(), schedule="exit=3", input_ids=inputs["input_ids"])
    assert refused.refused
    assert "pass pixel_values" in refused.problems[0]
    assert "would be refused" in str(refused)


def test_reports_print_with_rich(model: Any, inputs: dict[str, Tensor]) -> None:
    from rich.console import Console

    for report in (hidrop.inspect(model), hidrop.explain(model, **inputs)):
        buffer = io.StringIO()
        Console(width=200, file=buffer).print(report)
        shown = buffer.getvalue()
        assert all(table.title in shown for table in report.tables)
        assert report._repr_html_().count("<h4>") == len(report.tables)


def test_explain_counts_learned_ratios_and_no_other_schedules() -> None:
    model = hidrop.compile(
        tiny_llava(), "inject=1,prune=1:6,exit=3,selection=dtopk", backend="eager"
    )
    model.hidrop_ratios.values.data.fill_(7 / 9)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    found = hidrop.explain(model, **inputs)
    assert found.plan is not None
    assert found.plan.vision_tokens[1] == 2
    other = hidrop.explain(model, schedule="inject=1,prune=2:4,exit=3", **inputs)
    assert other.plan is not None
    assert other.plan.vision_tokens[1:3] == (9, 4)
    assert ("2 prune", 7) in other.segments
