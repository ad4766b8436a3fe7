"""The command line: what it prints, what it writes, and how it fails.

Over 400 lines: all commands share what the fixtures of the module make in seconds.
"""

import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import hidrop_fx
from hidrop_fx.cli import app
from hidrop_fx.cli.config_file import read_config
from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
from hidrop_fx.demo.build import build_model, build_processor
from hidrop_fx.demo.pictures import held_out, picture, varied_questions
from hidrop_fx.demo.rendering import half_blocks, stdout_console, token_bars
from hidrop_fx.models.loading import load_config, load_model
from hidrop_fx.models.prompts import chat_inputs

torch.set_num_threads(1)

SCHEDULE = "inject=3,prune=5:48+6:16+7:6,exit=9"
MEASURED = {"first_token_seconds", "decode_tokens_per_second", "kv_bytes"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, untrained."""
    directory = tmp_path_factory.mktemp("cli") / "model"
    build_model(0).save_pretrained(directory)
    build_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def image(model_dir: Path) -> Path:
    path = model_dir.parent / "image.png"
    picture(3, "test").image.save(path)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def error_of(*arguments: object) -> str:
    """The one line that a failing command prints."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1:] == lines
    assert "Traceback" not in result.stderr
    return lines[0]


def test_version_prints_the_version() -> None:
    assert succeeds("--version").stdout == f"hidrop-fx {hidrop_fx.__version__}\n"


COMMANDS = ("demo", "run", "plan", "inspect", "explain", "compare", "dump", "bench", "eval")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    text = succeeds(command, "--help").stdout
    assert f"Example: hidrop {command} --" in text
    assert "--json" in text


def test_without_a_command_the_help_is_shown() -> None:
    result = invoke()
    for command in COMMANDS:
        assert re.search(rf"^  {command}\b", result.output, re.MULTILINE)


# plan


def test_plan_is_llava_by_default() -> None:
    text = succeeds("plan", "--schedule", "hidrop-64").stdout
    assert "32 layers, hidden 4096" in text
    assert "64 text + 576 vision tokens" in text
    made = json.loads(succeeds("plan", "--schedule", "hidrop-64", "--json").stdout)
    expected = hidrop_fx.plan(
        "hidrop-64",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        vocab_size=32064,
        vision_tokens=576,
    )
    assert made == expected.to_dict()


def test_plan_of_a_model_needs_no_weights(tmp_path: Path) -> None:
    build_model(0).config.save_pretrained(tmp_path)
    arguments = ("--schedule", SCHEDULE, "--model", tmp_path, "--json")
    made = json.loads(succeeds("plan", *arguments).stdout)
    assert made["total_vision_tokens"] == 144
    assert made["vision_tokens"] == [0, 0, 0, 144, 144, 48, 16, 6, 6, 0, 0, 0]


def config_without(key: str, directory: Path) -> Path:
    """Write the shipped model's config without one key of it, or of its text config."""
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (config if key in config else config["text_config"]).pop(key, None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("key", ["none", "vision_feature_select_strategy", "image_seq_length"])
def test_config_read_as_json_plans_as_transformers_does(key: str, tmp_path: Path) -> None:
    directory = config_without(key, tmp_path)
    read = read_config(str(directory))
    assert (read is None) == (key != "none")
    planned = json.loads(
        succeeds("plan", "--schedule", SCHEDULE, "--model", directory, "--json").stdout
    )
    assert planned == hidrop_fx.plan(SCHEDULE, load_config(directory)).to_dict()


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "dtype", "vision_config"])
def test_config_that_leaves_a_size_to_its_default_is_not_read_as_json(
    key: str, tmp_path: Path
) -> None:
    assert read_config(str(config_without(key, tmp_path))) is None


def test_plan_with_sizes_and_several_images() -> None:
    arguments = ("--num-layers", 4, "--hidden-size", 64, "--intermediate-size", 96)
    counts = ("--text-tokens", 5, "--images", 3, "--batch-size", 2, "--new-tokens", 7)
    made = json.loads(
        succeeds("plan", "--schedule", "prune=1:10", *arguments, *counts, "--json").stdout
    )
    assert made["vision_tokens"] == [3 * 576, 30, 30, 30]
    assert made["geometry"]["hidden_size"] == 64
    assert (made["text_tokens"], made["batch_size"], made["new_tokens"]) == (5, 2, 7)


def test_plan_on_several_gpus() -> None:
    given = ("--schedule", "hidrop-64", "--batch-size", 8, "--world-size", 16)
    links = ("--strategy", "hsdp", "--bandwidth", "300e9", "--node-bandwidth", "200gb")
    made = json.loads(succeeds("plan", *given, *links, "--node-size", 4, "--json").stdout)
    cluster = made["scale_out"]["cluster"]
    assert (cluster["world_size"], cluster["strategy"], cluster["node_size"]) == (16, "hsdp", 4)
    assert (cluster["bandwidth"], cluster["node_bandwidth"]) == (300e9, 25e9)
    table = succeeds("plan", *given, "--node-bandwidth", "400gb").stdout
    assert "break-even: 10933 tokens a GPU and layer" in table
    assert "hybrid sharding: saves" in table
    assert "world_size=..., too" in error_of("plan", "--schedule", "hidrop-64", *links)


def test_plan_reads_a_schedule_file(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(hidrop_fx.Schedule.parse("inject=4,exit=20").to_json())
    made = json.loads(succeeds("plan", "--schedule", file, "--json").stdout)
    assert (made["schedule"]["inject"], made["schedule"]["exit"]) == (4, 20)


def test_plan_counts_launches_of_the_sizes() -> None:
    sizes = ("--num-layers", 2, "--hidden-size", 64, "--intermediate-size", 96, "--device", "h100")
    table = succeeds("plan", "--schedule", "prune=1:5", *sizes, "--launches").stdout
    assert "launches without a graph" in table
    assert "expected of a decode" in table


@pytest.mark.slow
def test_plan_counts_launches_of_a_model_without_its_weights(tmp_path: Path) -> None:
    build_model(0).config.save_pretrained(tmp_path)
    given = (
        "--schedule",
        SCHEDULE,
        "--model",
        tmp_path,
        "--device",
        "h200",
        "--launches",
        "--json",
    )
    made = json.loads(succeeds("plan", *given).stdout)
    counted = made["roofline"]["launches"]
    assert len(counted["prefill"]["runs"]) == len(made["segments"])
    assert counted["prefill"]["total"] > counted["identity"]["prefill"]["total"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "identity", "--launches"), "pass --device h100"),
        (("--schedule", "nonsense"), "cannot read 'nonsense'"),
        (("--schedule", "missing.json"), "missing.json"),
        (("--schedule", "inject=40"), "the model has 32 layers"),
        (("--schedule", "identity", "--text-tokens", 0), "text_tokens"),
        (("--schedule", "identity", "--model", "/nowhere/at/all"), "no such directory"),
    ],
)
def test_plan_refuses_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    assert message in error_of("plan", *arguments)


# run


def test_run_prints_one_json_object(model_dir: Path, image: Path) -> None:
    result = succeeds(
        *("run", "--model", model_dir, "--image", image, "--schedule", SCHEDULE, "--backend"),
        *("eager", "--prompt", "Which digit is at the top left?", "--max-new-tokens", 3),
        *("--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa"),
        *("--compare", "--json"),
    )
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert set(found) == {
        *("model", "images", "prompt", "answer", "schedule", "backend", "tokens", "hf"),
        *("compile_seconds", "fallbacks", *MEASURED),
    }
    assert set(found["hf"]) == {"answer", *MEASURED}
    text = found["tokens"][0]
    assert found["tokens"] == [
        *[text] * 3,
        *[text + 144] * 2,
        *(text + 48, text + 16, text + 6, text + 6),
        *[text] * 3,
    ]
    assert found["schedule"] == hidrop_fx.Schedule.parse(SCHEDULE).to_dict()
    assert found["first_token_seconds"] > 0
    assert found["kv_bytes"] < found["hf"]["kv_bytes"] / 3


def test_run_under_the_identity_answers_as_hugging_face(model_dir: Path, image: Path) -> None:
    found = json.loads(
        succeeds(
            *("run", "--model", model_dir, "--image", image, "--image", image, "--compare"),
            *("--schedule", "identity", "--backend", "eager", "--prompt", "How many ?"),
            *("--max-new-tokens", 6, "--json"),
        ).stdout
    )
    assert found["answer"] == found["hf"]["answer"]
    assert set(found["tokens"]) == {found["tokens"][0]}
    assert found["tokens"][0] > 2 * 144


def test_a_schedule_that_was_saved_with_the_model_is_known_by_name(
    model_dir: Path, image: Path, tmp_path: Path
) -> None:
    learns = "inject=3,prune=5:48+6:16,selection=dtopk"
    model, _ = load_model(model_dir, device="cpu")
    hidrop_fx.compile(model, {"full": "identity", "fast": learns}, backend="eager")
    model.hidrop_ratios_fast.values.data.copy_(torch.tensor([0.5, 0.75]))
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    build_processor().save_pretrained(saved)
    planned = succeeds("plan", "--model", saved, "--schedule", "fast", "--json").stdout
    assert json.loads(planned)["schedule"] == hidrop_fx.Schedule.parse(learns).to_dict()
    given = ("run", "--model", saved, "--image", image, "--prompt", "Which word ?", "--json")
    given += ("--backend", "eager", "--max-new-tokens", 1, "--schedule")
    found = json.loads(succeeds(*given, "fast").stdout)
    tokens = found["tokens"]
    assert [tokens[5] - tokens[0], tokens[6] - tokens[0]] == [72, 18], "as many as were learned"
    assert "cannot read 'slow'" in error_of(*given, "slow")


def test_run_prints_a_table_for_people(model_dir: Path, image: Path) -> None:
    result = succeeds(
        *("run", "--model", model_dir, "--image", image, "--schedule", SCHEDULE, "--compare"),
        *("--backend", "eager", "--prompt", "Which word ?", "--max-new-tokens", 2),
    )
    assert "time to first token" in result.stdout
    assert "Hugging Face" in result.stdout
    assert re.search(r"tokens per layer  0-2: \d+, 3-4: \d+, 5: \d+", result.stdout)
    assert f"loading {model_dir}" in result.stderr


def test_run_uses_the_chat_template_where_there_is_one(model_dir: Path, image: Path) -> None:
    model, processor = load_model(str(model_dir), device="cpu")
    shown = [Image.open(image), Image.open(image)]
    templated = chat_inputs(model, processor, shown, "Where is the 7 ?")
    text = processor.tokenizer.decode(templated["input_ids"][0])
    assert text.count("<s>") == 1
    assert text.count("<image>") == 2 * 144
    assert text.endswith("ASSISTANT :") or text.endswith("ASSISTANT:")
    processor.chat_template = None
    plain = chat_inputs(model, processor, shown, "Where is the 7 ?")
    assert torch.equal(plain["input_ids"], templated["input_ids"])
    assert torch.equal(plain["pixel_values"], templated["pixel_values"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--image": "nowhere.png"}, "no image file nowhere.png"),
        ({"--image": "CONFIG"}, "not an image"),
        ({"--model": "/nowhere"}, "cannot load /nowhere: no such directory"),
        ({"--schedule": "inject=99"}, "the model has 12 layers"),
        ({"--schedule": "bogus"}, "cannot read 'bogus'"),
        ({"--backend": "tvm"}, "use one of inductor, aot_eager, eager"),
        ({"--device": "abacus"}, "device='abacus' cannot be used"),
        ({"--dtype": "int3"}, "use one of auto, float32"),
        ({"--prompt": "What is <image> ?"}, "leave <image> out"),
        ({"--attn-implementation": "bogus"}, "bogus"),
    ],
)
def test_run_refuses_bad_arguments(
    changed: dict[str, str], message: str, model_dir: Path, image: Path
) -> None:
    options = {
        "--model": str(model_dir),
        "--image": str(image),
        "--prompt": "Which digit ?",
        "--schedule": SCHEDULE,
        "--backend": "eager",
    } | {k: v.replace("CONFIG", str(model_dir / "config.json")) for k, v in changed.items()}
    assert message in error_of("run", *[part for pair in options.items() for part in pair])


def test_missing_options_are_usage_errors() -> None:
    result = invoke("plan")
    assert result.exit_code == 2
    assert "Missing option" in result.stderr
    message = error_of("run", "--model", "/nowhere", "--schedule", "identity")
    assert "--image, --prompt must be given with --model" in message


# Commands that look into a model; without --model they ask the shipped one, offline.


def test_compare_tells_by_its_exit_code() -> None:
    result = succeeds("compare", "--backend", "eager", "--json", "--disable", "kv_cache")
    found = json.loads(result.stdout)
    assert (found["ok"], found["reference"], found["disabled"]) == (True, "loop", ["kv_cache"])
    assert len(found["layers"]) == 12 + 1
    result = invoke("compare", "--backend", "eager", "--schedule", "identity", "--tolerance", 0)
    assert result.exit_code in (0, 1)
    departs = "is the first to depart" in result.stdout
    assert departs == (result.exit_code == 1)
    assert "transformers' own forward" in result.stdout
    assert "cannot be disabled" in error_of("compare", "--backend", "eager", "--disable", "prune")


def test_inspect_and_explain_agree(model_dir: Path, image: Path) -> None:
    given = ("--model", model_dir, "--image", image, "--prompt", "Which word ?")
    given += ("--schedule", SCHEDULE, "--backend", "eager", "--json")
    seen = json.loads(succeeds("inspect", *given).stdout)
    expected = json.loads(succeeds("explain", *given).stdout)
    assert seen["totals"]["flops"] == expected["flops"]
    assert seen["totals"]["kv_bytes"] == expected["kv_bytes"]
    assert [e["name"] for e in seen["executables"]] == ["prefill", "decode"]
    assert seen["executables"][0]["cuda_graph"] == "no: the model is on cpu"


def test_dump_writes_a_report_with_pictures(tmp_path: Path) -> None:
    result = succeeds("dump", "--backend", "eager", "--output", tmp_path / "new", "--json")
    found = json.loads(result.stdout)
    assert "prefill/03_prune.py" in found["files"]
    assert "data:image/png;base64," in (tmp_path / "new" / "report.html").read_text()
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in error_of("dump", "--backend", "eager", "--output", file / "below")


def test_bench_times_plain_and_compiled() -> None:
    arguments = ("--new-tokens", 2, "--repeats", 1, "--backend", "eager")
    found = json.loads(succeeds("bench", *arguments, "--json").stdout)
    for name in ("hf", "hidrop"):
        assert set(found[name]) == MEASURED
    assert found["token_layer_ratio"] == pytest.approx(3.62, abs=0.01)


def test_run_of_the_shipped_model_draws_a_heat_map(tmp_path: Path) -> None:
    path = tmp_path / "kept.png"
    arguments = ("run", "--backend", "eager", "--max-new-tokens", 2, "--heatmap")
    found = json.loads(succeeds(*arguments, path, "--json").stdout)
    assert found["heatmap"] == str(path)
    with Image.open(path) as written:
        assert written.width > 3 * written.height
    assert "use a name in .png" in error_of(*arguments, tmp_path / "kept.what")


# demo


def demo(model_dir: Path, output: Path, *arguments: object) -> Any:
    return succeeds(
        *("demo", "--model", model_dir, "--output", output, "--backend", "eager", *arguments)
    )


def check_demo(found: dict[str, Any], output: Path, seed: int, count: int) -> None:
    shown = picture(seed, "test")
    assert found["picture"] == str(output / f"picture-{seed}.png")
    with Image.open(found["picture"]) as written:
        assert written.tobytes() == shown.image.tobytes()
    assert len(found["questions"]) == count
    asked = varied_questions(shown, seed, count)
    for one, question in zip(found["questions"], asked, strict=True):
        assert set(one) == {"question", "expected", "hf", "hidrop"}
        assert one["question"] == question.sentence
        assert one["expected"] == question.answer
    for name in ("hf", "hidrop"):
        assert set(found[name]) == MEASURED
        assert found[name]["first_token_seconds"] > 0
        assert found[name]["decode_tokens_per_second"] is None
        right = sum(one[name] == one["expected"] for one in found["questions"])
        assert found["correct"][name] == right
    assert 0 < found["hidrop"]["kv_bytes"] < found["hf"]["kv_bytes"]
    asked_at_once = found["batch"]["questions"]
    for name in ("hf", "hidrop"):
        timed = found["batch"][name]
        assert 0 <= timed["correct"] <= asked_at_once
        assert timed["questions_per_second"] == pytest.approx(asked_at_once / timed["seconds"])
    assert sum(found["tokens"]) < sum(found["identity_tokens"])


def test_demo_prints_json(model_dir: Path, tmp_path: Path) -> None:
    result = demo(
        *(model_dir, tmp_path / "new", "--schedule", SCHEDULE, "--json"),
        *("--questions", 3, "--seed", 5, "--batch", 9),
    )
    assert result.stderr == ""
    found = json.loads(result.stdout)
    check_demo(found, tmp_path / "new", 5, 3)
    assert found["schedule"] == hidrop_fx.Schedule.parse(SCHEDULE).to_dict()
    assert found["backend"] == "eager"
    shown = {id(drawn) for drawn, _ in itertools.islice(held_out(first=6), 9)}
    assert (found["batch"]["questions"], found["batch"]["pictures"]) == (9, len(shown))


def test_demo_prints_tables_for_people(model_dir: Path, tmp_path: Path) -> None:
    arguments = ("--schedule", SCHEDULE, "--questions", 2, "--batch", 4)
    result = demo(model_dir, tmp_path, *arguments)
    for part in (
        *(str(tmp_path / "picture-0.png"), "question", "expected", "Hugging Face", "schedule"),
        *("tokens per layer", "time to first token", "KV cache", "is tiny", "uncompiled"),
        *("4 questions about 1 picture, in one call", "answers right", "questions a second"),
    ):
        assert part in result.stdout
    assert "▀" not in result.stdout
    assert "loading the model" in result.stderr


def test_demo_refuses_bad_arguments(tmp_path: Path, model_dir: Path) -> None:
    assert "no directory" in error_of(
        "demo", "--model", tmp_path / "none", "--schedule", "identity"
    )
    assert "use one of" in error_of("demo", "--backend", "tvm", "--schedule", "identity")
    file = tmp_path / "file"
    file.write_text("")
    arguments = ("--model", model_dir, "--schedule", SCHEDULE, "--backend", "eager")
    assert str(file) in error_of("demo", *arguments, "--output", file / "below")


def test_demo_of_the_shipped_model_answers_most_questions(tmp_path: Path) -> None:
    result = succeeds("demo", "--output", tmp_path, "--backend", "eager", "--json")
    found = json.loads(result.stdout)
    check_demo(found, tmp_path, 0, 6)
    shipped = hidrop_fx.Schedule.from_json(SCHEDULE_FILE.read_text())
    assert hidrop_fx.Schedule.from_json(json.dumps(found["schedule"])) == shipped
    assert found["correct"]["hf"] >= 4
    assert found["correct"]["hidrop"] >= 4
    assert found["batch"]["questions"] == 32
    assert found["batch"]["pictures"] > 4
    for name in ("hf", "hidrop"):
        assert found["batch"][name]["correct"] >= 28


@pytest.mark.parametrize(("ascii_only", "full", "rest"), [(True, "#", "."), (False, "█", "░")])
def test_token_bars_are_as_long_as_the_counts(ascii_only: bool, full: str, rest: str) -> None:
    layers = [SimpleNamespace(tokens=tokens) for tokens in (10, 10, 40, 20)]
    plan = SimpleNamespace(identity=SimpleNamespace(tokens=(40,) * 4))
    report: Any = SimpleNamespace(layers=layers, plan=plan)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(token_bars(report, ascii_only=ascii_only))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [
        ["0-1", full * 10 + rest * 30, "10"],
        ["2", full * 40, "40"],
        ["3", full * 20 + rest * 20, "20"],
    ] == lines[-3:]


def test_demo_questions_start_with_one_of_each_kind() -> None:
    shown = picture(0, "test")
    many = varied_questions(shown, 0, 1000)
    kinds = [question.kind for question in many]
    different = len(set(kinds))
    assert len(set(kinds[:different])) == different
    assert len({question.prompt_text for question in many}) == len(many)
    assert all(question.sentence.endswith("?") for question in many)


def test_half_blocks_show_two_rows_a_line() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 1, 4, 2))
    text = half_blocks(image, 4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀\n"
    assert {str(span.style) for span in text.spans} == {
        *("#ff0000 on #0000ff", "#ff0000 on #ff0000")
    }


def test_piped_output_is_wide_enough() -> None:
    assert stdout_console().width >= 80
