"""`hidrop.calibrate` as a user meets it: models before and after compile, files, refinement, commands.

Over 400 lines in one file: all tests share calibrations that take seconds to make.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hidrop_fx as hidrop
from hidrop_fx.analysis.data.records import batches_of, read_records
from hidrop_fx.cli import app
from hidrop_fx.demo.records import drawn_records
from hidrop_fx.errors import HidropError, InputError, ScheduleError, UnsupportedModelError
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.models import IMAGE, batch, tiny_llava

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS = ([5, 6, IMAGE, 7, 8], [9, IMAGE, 11], [12, 13, IMAGE, 14, 15], [IMAGE, 16])
LAYERS = 4


def batches(model: Any, count: int = 3) -> list[dict[str, Any]]:
    return [batch(model, ROWS, padding=("left", "right")[n % 2], seed=n) for n in range(count)]


def make(model: Any, **options: Any) -> hidrop.Calibration:
    return hidrop.calibrate(
        model, batches(model), windows=(1, 2), tops=(3, 6), progress=False, **options
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava("llama", num_layers=LAYERS)


@pytest.fixture(scope="module")
def made(model: Any) -> hidrop.Calibration:
    """Calibrated, with one chosen and one refined schedule."""
    torch.set_num_threads(1)
    calibration = make(model)
    start = calibration.schedule(average_vision_tokens=4, trials=5)
    calibration.refine(start, 8)
    return calibration


def measured(calibration: hidrop.Calibration) -> dict[str, Any]:
    data = calibration.to_dict()
    return {k: v for k, v in data.items() if k not in ("seconds", "passes")}


def test_calibration_reports_forward_passes_time_and_samples(made: hidrop.Calibration) -> None:
    assert made.samples == 12
    # One pass to measure; 2 * 6 sweep points, of which the untouched model is one; trials beyond.
    assert made.passes >= 3 * (1 + 2 * LAYERS - 1)
    assert made.seconds > 0
    assert made.typical.tokens_per_image == 9
    text = made.table()
    assert f"{made.passes} forward passes" in text
    assert "inject at layer" in text
    assert str(made.decisions[-1].schedule) in text


def test_chosen_and_refined_schedules_keep_their_budget(made: hidrop.Calibration) -> None:
    chosen, refined = made.decisions
    for decision in (chosen, refined):
        assert made.typical.plan(decision.schedule, images=1).average_vision_tokens <= 4
        assert decision.budget == "average_vision_tokens <= 4"
        assert decision.reasons
        assert decision.search is not None
        assert decision.held_out is not None
        assert (decision.search.samples, decision.held_out.samples) == (9, 3)
    assert refined.search.kl <= chosen.search.kl
    assert 3 * refined.search.kl + refined.held_out.kl <= 3 * chosen.search.kl + chosen.held_out.kl


def test_calibrating_a_compiled_model_in_training_gives_the_same_and_changes_nothing(
    made: hidrop.Calibration,
) -> None:
    model = tiny_llava("llama", num_layers=LAYERS).train()
    model.model.vision_tower.eval()
    hidrop.compile(model, "inject=2,exit=3", backend="eager")
    runtime = runtime_of(model)
    modes = [m.training for m in model.modules()]
    attention = model.config._attn_implementation

    again = make(model)
    again.refine(again.schedule(average_vision_tokens=4, trials=5), 8)

    assert measured(again) == measured(made)
    assert runtime_of(model) is runtime
    assert runtime.schedule == hidrop.Schedule.parse("inject=2,exit=3")
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.get_decoder().layers)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("inject=1,prune=2:3,exit=3,selection=dtopk", {"on_new_shape": "error"}),
        ("inject=1,prune=2:3,exit=3", {"cuda_graphs": True, "lowering": "whole"}),
    ],
    ids=str,
)
def test_calibration_does_not_depend_on_how_the_model_was_compiled(
    schedule: str, options: dict[str, Any], model: Any, made: hidrop.Calibration
) -> None:
    hidrop.compile(model, schedule, backend="eager", **options)
    try:
        runtime = runtime_of(model)
        ratios = runtime.ratios
        before = None if ratios is None else ratios.values.detach().clone()
        again = make(model)
        assert (again.measurements, again.exits) == (made.measurements, made.exits)
        assert again.injections == made.injections
        chosen = again.schedule(average_vision_tokens=4, trials=5)
        assert chosen == made.decisions[0].schedule
        assert runtime_of(model) is runtime
        assert runtime.ratios is ratios
        assert not runtime.programs.captures
        assert before is None or torch.equal(ratios.values, before)
    finally:
        hidrop.restore(model)


def test_refine_turns_learned_counts_into_hard_ones(made: hidrop.Calibration) -> None:
    start = hidrop.Schedule(inject=1, prune={2: 3}, exit=3, selection="dtopk", rank="soft")
    found = made.refine(start, 3)
    assert found.selection == "hard"
    assert made.decisions.pop().search is not None
    assert made.bench is not None
    assert made.bench.search.run(start) is made.bench.search.run("inject=1,prune=2:3,exit=3")


def test_calibration_removes_its_hooks_after_an_error(model: Any) -> None:
    bad = batch(model, ROWS)
    bad["input_ids"] = bad["input_ids"].clone()
    bad["input_ids"][0, -1] = 10**6
    with pytest.raises(IndexError):
        hidrop.calibrate(model, [bad], progress=False)
    for module in model.get_decoder().modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_without_pruning_trials_the_first_pyramid_is_taken(made: hidrop.Calibration) -> None:
    before = len(made.decisions)
    made.schedule(average_vision_tokens=3, trials=0)
    decision = made.decisions.pop()
    assert len(made.decisions) == before
    assert "none was tried" in decision.reasons[-1]


# Files


def test_a_saved_calibration_comes_back_equal(made: hidrop.Calibration, tmp_path: Path) -> None:
    made.save(tmp_path / "c.json")
    again = hidrop.Calibration.load(tmp_path / "c.json")
    assert again.to_dict() == made.to_dict()
    assert again == made
    assert again.table() == made.table()
    json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)


def test_a_loaded_calibration_chooses_but_cannot_measure(
    made: hidrop.Calibration, tmp_path: Path
) -> None:
    made.save(tmp_path / "c.json")
    again = hidrop.Calibration.load(tmp_path / "c.json")
    assert again.typical.plan(again.schedule(kv_share=0.6)).kv_bytes > 0
    for call in (lambda: again.refine("inject=1,exit=3"), lambda: again.schedule(latency=1.0)):
        with pytest.raises(HidropError, match=r"calibration\.attach\(model, batches\)"):
            call()


def test_refine_continues_from_saved_outcomes(
    made: hidrop.Calibration, model: Any, tmp_path: Path
) -> None:
    made.save(tmp_path / "c.json")
    again = hidrop.Calibration.load(tmp_path / "c.json").attach(model, batches(model))
    start, refined = (decision.schedule for decision in made.decisions)
    passes = again.passes
    assert again.refine(start, 8, average_vision_tokens=4) == refined
    assert again.passes == passes
    again.refine(start, 9, average_vision_tokens=4)
    assert again.passes > passes


def test_attach_refuses_other_samples(made: hidrop.Calibration, model: Any, tmp_path: Path) -> None:
    made.save(tmp_path / "c.json")
    again = hidrop.Calibration.load(tmp_path / "c.json")
    with pytest.raises(InputError, match="pass the same batches"):
        again.attach(model, batches(model, 2))
    with pytest.raises(ScheduleError, match=r"num_layers=4.*num_layers=3"):
        again.attach(tiny_llava("llama", num_layers=3), batches(model))
    assert again.bench is None


def test_attach_refuses_another_decoder_behind_the_same_images(
    made: hidrop.Calibration, tmp_path: Path
) -> None:
    made.save(tmp_path / "new" / "c.json")
    again = hidrop.Calibration.load(tmp_path / "new" / "c.json")
    tuned = tiny_llava("llama", num_layers=LAYERS)
    tuned.get_decoder().layers[1].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(InputError, match="its weights are others"):
        again.attach(tuned, batches(tuned))
    with pytest.raises(HidropError, match="backend='fast'"):
        again.attach(tuned, [], backend="fast")
    assert again.bench is None


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"format": 99}', '{"format": 1}'])
def test_files_that_hold_no_calibration_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json"):
        hidrop.Calibration.load(tmp_path / "c.json")


def test_checkpoint_of_refine_loads_as_a_calibration(
    made: hidrop.Calibration, tmp_path: Path
) -> None:
    best = made.refine("inject=1,prune=2:4,exit=3", 4, checkpoint=tmp_path / "c.json")
    loaded = hidrop.Calibration.load(tmp_path / "c.json")
    assert loaded.decisions[-1].schedule == best
    made.decisions.pop()


# Wrong use, and small data


def test_calibration_errors_name_the_remedy(made: hidrop.Calibration, model: Any) -> None:
    with pytest.raises(ScheduleError, match="start from one inside it"):
        made.refine("inject=0", 3, average_vision_tokens=3)
    with pytest.raises(ScheduleError, match="needs labels"):
        made.schedule(average_vision_tokens=3, objective="accuracy")
    with pytest.raises(ScheduleError, match="objective='speed'"):
        made.refine("inject=1", 3, objective="speed")
    with pytest.raises(ScheduleError, match="evaluations=-1"):
        made.refine("inject=1", -1)
    with pytest.raises(ScheduleError, match=r"evaluations=1\.5"):
        made.refine("inject=1", 1.5)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="trials=-1"):
        made.schedule(average_vision_tokens=3, trials=-1)
    with pytest.raises(ScheduleError, match="tokens: no such budget; use one of average_vision"):
        made.refine("inject=1", 3, tokens=3)
    with pytest.raises(ScheduleError, match="schedule is a NoneType"):
        made.refine(None, 3)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="the model has 4 layers"):
        made.refine("inject=9", 3)
    with pytest.raises(InputError, match="decision=7"):
        made.plot(decision=7)
    with pytest.raises(HidropError, match="backend='fast'"):
        hidrop.calibrate(model, [], backend="fast")
    with pytest.raises(InputError, match="tolerance=2"):
        hidrop.calibrate(model, [], tolerance=2)
    with pytest.raises(InputError, match="windows="):
        hidrop.calibrate(model, [], windows=(0,))
    with pytest.raises(UnsupportedModelError):
        hidrop.calibrate(torch.nn.Linear(2, 2), [])


def test_one_sample_is_calibrated_without_a_split(model: Any) -> None:
    found = hidrop.calibrate(model, [batch(model, [ROWS[0]])], windows=(1,), progress=False)
    found.refine(found.schedule(average_vision_tokens=3, trials=2), 2)
    assert found.samples == 1
    assert found.decisions[-1].held_out is None
    assert found.decisions[-1].search.samples == 1


def test_latency_is_measured_and_bounds_the_schedule(made: hidrop.Calibration) -> None:
    bench = made.bench
    assert bench is not None
    assert 0 < bench.latency(hidrop.Schedule()) < 5
    assert bench.latency(hidrop.Schedule()) == bench.latency(hidrop.Schedule())
    made.schedule(latency=1e3)
    assert "the fastest of 5 runs; the slowest took" in made.decisions.pop().reasons[-1]
    bench.latency = lambda s: 1e-3 * sum(made.typical.plan(s).tokens)  # type: ignore[method-assign]
    limit = 0.7 * bench.latency(hidrop.Schedule())
    chosen = made.schedule(latency=limit, trials=3)
    assert bench.latency(chosen) <= limit
    assert made.decisions.pop().budget.endswith(" s")
    del bench.latency


def test_plot_writes_a_small_png(made: hidrop.Calibration, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = made.plot(tmp_path / "c.png")
    assert len(figure.axes) == 5
    said = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "keep" in said
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
    assert (tmp_path / "c.png").stat().st_size < 300_000
    assert "data:image/png;base64," in made.to_html()


def test_methods_are_scaled_to_the_budget_and_the_best_is_taken(
    made: hidrop.Calibration, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    fixed = hidrop.Schedule(inject=2, prune={2: 4}, exit=3)
    names = ["hidrop", "fastv(layer=1)", "divprune", "divprune+hidrop", "vtw(layer=3)", fixed]
    best = made.schedule(average_vision_tokens=4, methods=names, trials=2)
    decision = made.decisions[-1]
    tried = decision.candidates
    assert {one.name for one in tried} == {
        "hidrop", "fastv(layer=1)", "divprune", "vtw(layer=3)", str(fixed),
        "divprune to 50%+hidrop", "divprune to 25%+hidrop",
    }  # fmt: skip
    assert best == decision.schedule == tried[0].schedule
    kl = [one.search.kl for one in tried if one.search is not None]
    assert kl == sorted(kl)
    assert len(kl) == len(tried)
    for one in tried:
        planned = made.typical.plan(one.schedule, images=1)
        assert one.cost == planned.average_vision_tokens <= 4
    by_name = {one.name: one.schedule for one in tried}
    assert by_name["fastv(layer=1)"].prune[1] == pytest.approx((4 * 4 - 9) / 3 / 9, abs=1 / 9)
    assert by_name["divprune"].entering_tokens(9) == 4
    assert by_name["divprune to 50%+hidrop"].entering_tokens(9) == 4
    assert by_name["vtw(layer=3)"] == hidrop.Schedule(exit=1)
    assert by_name[str(fixed)] == hidrop.Schedule(inject=2, exit=3)  # all nine, at its one layer
    assert f"of {len(tried)} methods that fit average_vision_tokens <= 4" in decision.reasons[0]
    assert re.search("the best kl on 9 samples, KL .* against", decision.reasons[0])
    assert "Methods held against each other" in made.table()
    made.save(tmp_path / "c.json")
    assert hidrop.Calibration.load(tmp_path / "c.json").decisions == made.decisions
    assert len(made.plot().axes) == 6
    made.decisions.pop()
    made.decisions.pop()


@torch.no_grad()
def test_the_withdrawal_is_found_by_the_rule_of_vtw(made: hidrop.Calibration) -> None:
    """Against plain exits of a compiled model and its logits: KL(exit || full), last prompt token, mean over samples."""
    other, divergences = tiny_llava("llama", num_layers=LAYERS), {}
    inputs = batches(other)
    full = [other(**given).logits.log_softmax(-1) for given in inputs]
    for layer in (1, 2, 3):
        hidrop.compile(other, hidrop.Schedule(exit=layer), backend="eager")
        found = []
        for given, wanted in zip(inputs, full, strict=True):
            last = given["attention_mask"].shape[1] - 1 - given["attention_mask"].flip(1).argmax(1)
            rows = range(len(last))
            ours = other(**given).logits[rows, last].log_softmax(-1)
            found += (ours.exp() * (ours - wanted[rows, last])).sum(-1).tolist()
        divergences[layer] = sum(found) / len(found)
        hidrop.restore(other)
    falling = sorted(divergences, key=divergences.__getitem__)
    for eta in (divergences[falling[0]] * 1.01, divergences[falling[-1]] * 1.01):
        expected = next(layer for layer in (1, 2, 3) if divergences[layer] <= eta)
        assert made.withdrawal(eta=eta, start=1) == hidrop.Schedule(exit=expected)
        assert made.decisions.pop().origin == "withdrawal"
    with pytest.raises(ScheduleError, match=rf"the closest is layer {falling[0]} with"):
        made.withdrawal(eta=divergences[falling[0]] * 0.5, start=1)
    with pytest.raises(ScheduleError, match="start=5 but the model has 4 layers"):
        made.withdrawal()


def test_methods_that_do_not_fit_are_named(made: hidrop.Calibration) -> None:
    names = ["fastv(layer=3)", "vtw(layer=9)", "visionzip(dominant=2,contextual=1)", "fastv+hidrop"]
    with pytest.raises(ScheduleError) as caught:
        made.schedule(average_vision_tokens=2, methods=names, trials=0)
    for reason in (
        r"fastv\(layer=3\) was not tried: average_vision_tokens <= 2 is out of reach",
        r"vtw\(layer=9\) was not tried: exit=9 but the model has 4 layers",
        r"visionzip.* was not tried: it reads the vision tower",
        r"fastv\+hidrop was not tried: fastv is no stage before the decoder",
    ):
        assert re.search(reason, str(caught.value)), reason
    known = list(made.decisions)
    for methods in ("fastv", [], hidrop.Schedule(exit=2)):
        with pytest.raises(ScheduleError, match="name several in a list"):
            made.schedule(average_vision_tokens=2, methods=methods)
    assert made.decisions == known


def test_a_budget_that_no_pyramid_meets_leaves_the_other_methods(made: hidrop.Calibration) -> None:
    best = made.schedule(average_vision_tokens=0.1, methods=["hidrop", "vica(layers=(0,))"])
    assert best == hidrop.Schedule(reads=(0,), freeze_system=True)
    assert any("hidrop was not tried: " in reason for reason in made.decisions.pop().reasons)


# Data and the command


def conversation(image: Any, question: str, *answers: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}]
    turns += [{"from": "gpt", "value": answer} for answer in answers]
    return {"image": image, "conversations": turns}


def test_llava_json_is_read(tmp_path: Path) -> None:
    entries = [
        conversation("a.png", "Which digit ?", "7"),
        {"conversations": [{"from": "human", "value": "no image"}]},
        conversation(["a.png", "b.png"], "Both ?"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    one, two = read_records(tmp_path / "data.json", images=tmp_path / "pictures")
    assert one.images == (tmp_path / "pictures" / "a.png",)
    assert (one.prompt, one.answer) == ("Which digit ?", "7")
    assert (len(two.images), two.answer) == (2, None)
    assert len(read_records(tmp_path / "data.json", limit=1)) == 1


def test_a_folder_takes_its_questions_in_turn_or_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "prompts.txt").write_text("first ?\n\nsecond ?\n")
    found = read_records(tmp_path)
    assert [(r.images[0].name, r.prompt) for r in found] == [  # type: ignore[union-attr]
        ("a.jpg", "first ?"),
        ("b.png", "second ?"),
    ]
    (tmp_path / "named.txt").write_text("b.png\tWhat ?\n")
    (only,) = read_records(tmp_path, prompts=tmp_path / "named.txt")
    assert (only.images[0], only.prompt) == (tmp_path / "b.png", "What ?")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", "{}", "holds a dict; expected a list"),
        ("data.json", "[", "cannot read"),
        ("data.json", "[]", "no sample with an image"),
        ("data.json", '[{"image": "a.png"}]', "entry 0 .* has no conversations"),
        ("data.json", '[{"image": "a", "conversations": []}]', "entry 0 .* no first turn"),
        ("data.json", '[{"image": 5, "conversations": []}]', "entry 0 .* has image"),
        ("prompts.txt", "", "is empty"),
        ("prompts.txt", "a\tb\nc", "has no tab"),
        ("other.txt", "", "no prompt file"),
        ("nothing", None, "no calibration data at"),
    ],
)
def test_bad_data_files_are_refused_with_the_place(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_records(path if name.endswith("json") or content is None else tmp_path)


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot read .*prompts\.txt.*UTF-8"):
        read_records(tmp_path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlavaForConditionalGeneration

    from hidrop_fx.demo.build import build_config, build_processor

    directory = tmp_path_factory.mktemp("calibrate") / "model"
    config = build_config()
    config.text_config.num_hidden_layers = LAYERS
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    build_processor().save_pretrained(directory)
    return directory


def test_answers_of_records_are_appended_and_supervised(model_dir: Path) -> None:
    from hidrop_fx.models.loading import load_model

    loaded, processor = load_model(str(model_dir), device="cpu")
    records = drawn_records(3)
    (made,) = batches_of(loaded, processor, records, batch_size=4, answers=True)
    for row, record in enumerate(records):
        told = made["input_ids"][row][made["labels"][row] != -100]
        assert processor.tokenizer.decode(told).strip() == record.answer
        last = int(made["attention_mask"][row].sum()) - 1
        assert made["labels"][row, last] != -100
    (asked,) = batches_of(loaded, processor, records, batch_size=4, answers=False)
    assert "labels" not in asked
    assert len(asked["pixel_values"]) == 3


def test_calibrate_command_writes_a_schedule_that_other_commands_read(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, record in enumerate(drawn_records(2)):
        record.images[0].save(folder / f"{number}.png")  # type: ignore[union-attr]
    (folder / "prompts.txt").write_text("Which digit is at the top left?\n")
    result = CliRunner().invoke(
        app,
        [
            *("calibrate", "--model", str(model_dir), "--data", str(folder), "--budget", "kv=0.5"),
            *("--samples", "2", "--trials", "2", "--output", str(tmp_path / "out"), "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    file = tmp_path / "out" / "schedule.json"
    schedule = hidrop.Schedule.parse(str(file))
    assert schedule.to_dict() == printed["schedule"]
    assert str(file) in printed["files"]
    loaded = hidrop.Calibration.load(tmp_path / "out" / "calibration.json")
    plan = loaded.typical.plan(schedule)
    assert plan.kv_bytes <= 0.5 * plan.identity.kv_bytes
    planned = CliRunner().invoke(app, ["plan", "--schedule", str(file), "--num-layers", "4"])
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "many"], "cannot read the budget 'many'"),
        (["--budget", "9", "--model", "some/model"], "--data is missing"),
        (["--budget", "9", "--data", "/nowhere"], "no calibration data at /nowhere"),
        (["--budget", "9", "--backend", "fast"], "backend='fast'"),
        (["--budget", "9", "--output", "/dev/null/out"], "cannot write to --output /dev/null/out"),
    ],
)
def test_calibrate_command_names_the_error(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
