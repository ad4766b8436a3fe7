"""The training example: which tokens its collator supervises, and a run of a few steps."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from tests.support.paths import ROOT

sys.path.append(str(ROOT / "examples"))
import llava_data
import train_llava
from llava_data import Collator, Conversations

IGNORE = llava_data.IGNORE
ROUNDS = [
    {"from": "human", "value": "<image>\nWhere is the owl?"},
    {"from": "gpt", "value": "top left"},
    {"from": "human", "value": "How many words are there?"},
    {"from": "gpt", "value": "2"},
]
ROWS: list[dict[str, Any]] = [
    {"id": "rounds", "image": "a.png", "conversations": ROUNDS},
    {
        "id": "text",
        "conversations": [
            {"from": "human", "value": "Is there a thing?"},
            {"from": "gpt", "value": "no"},
        ],
    },
    {
        "id": "two images",
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image><image>\nWhich digit is at the top?"},
            {"from": "gpt", "value": "7"},
        ],
    },
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_DIR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    Image.new("RGB", (96, 96), "red").save(tmp_path / "a.png")
    Image.new("RGB", (96, 96), "blue").save(tmp_path / "b.png")
    return tmp_path


def conversations(folder: Path, processor: Any, **options: Any) -> Conversations:
    return Conversations(folder / "rows.json", folder, processor, **options)


def supervised_tokens(sample: dict[str, Any], processor: Any) -> dict[int, str]:
    """Column -> token, of the supervised ones."""
    columns = (sample["labels"] != IGNORE).nonzero().flatten().tolist()
    assert all(sample["labels"][c] == sample["input_ids"][c] for c in columns)
    tokens = processor.tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    return {column: tokens[column] for column in columns}


def test_every_answer_of_several_rounds_and_its_end_are_supervised(
    folder: Path, processor: Any
) -> None:
    sample = conversations(folder, processor)[0]
    # <s> USER : | 144 x <image> | Where is the owl ? ASSISTANT : -> the answer starts at 154.
    first = {154: "top", 155: "left", 156: "</s>"}
    # USER : How many words are there ? ASSISTANT : -> ten more columns.
    second = {167: "2", 168: "</s>"}
    assert supervised_tokens(sample, processor) == first | second
    assert len(sample["input_ids"]) == 169
    assert (sample["input_ids"] == processor.image_token_id).sum() == 144


def test_a_row_without_an_image_is_text_alone(folder: Path, processor: Any) -> None:
    sample = conversations(folder, processor)[1]
    # <s> USER : Is there a thing ? ASSISTANT : no </s>
    assert supervised_tokens(sample, processor) == {10: "no", 11: "</s>"}
    assert sample["images"] == []


def test_several_images_take_their_places_in_order(folder: Path, processor: Any) -> None:
    dataset = conversations(folder, processor)
    sample = dataset[2]
    assert (sample["input_ids"] == processor.image_token_id).sum() == 288
    assert list(supervised_tokens(sample, processor).values()) == ["7", "</s>"]
    batch = Collator(processor)([sample, dataset[0]])
    reds = batch["pixel_values"].mean(dim=(2, 3))[:, 0]
    assert reds[0] > 0 > reds[1]
    assert torch.equal(reds[0], reds[2])


def test_ids_are_those_of_the_processor(folder: Path, processor: Any) -> None:
    sample = conversations(folder, processor)[0]
    text = "".join(piece for piece, _ in llava_data.pieces_of(ROWS[0], processor))
    image = Image.open(folder / "a.png")
    expected = processor(images=image, text=text, return_tensors="pt")
    assert torch.equal(sample["input_ids"], expected["input_ids"][0])
    assert torch.equal(Collator(processor)([sample])["pixel_values"], expected["pixel_values"])


def test_a_batch_is_padded_on_the_right_and_pads_are_not_supervised(
    folder: Path, processor: Any
) -> None:
    dataset = conversations(folder, processor)
    batch = Collator(processor)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 169)
    assert batch["attention_mask"].sum(1).tolist() == [169, 12]
    assert (batch["input_ids"][1, 12:] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][1, 12:] == IGNORE).all()
    assert batch["pixel_values"].shape[0] == 1
    assert "pixel_values" not in Collator(processor)([dataset[1]])


def test_captions_are_an_image_and_what_is_said_of_it(folder: Path, processor: Any) -> None:
    sample = conversations(folder, processor, layout="caption")[0]
    tokens = supervised_tokens(sample, processor)
    assert tokens == {145: "top", 146: "left", 147: "2"}


def test_without_a_chat_template_turns_are_written_plainly(folder: Path, processor: Any) -> None:
    templated = conversations(folder, processor)[0]
    processor.chat_template, kept = None, processor.chat_template
    try:
        plain = conversations(folder, processor)[0]
    finally:
        processor.chat_template = kept
    assert torch.equal(plain["input_ids"], templated["input_ids"])
    assert torch.equal(plain["labels"], templated["labels"])


def test_rows_that_do_not_fit_together_are_refused(folder: Path, processor: Any) -> None:
    row = ROWS[0] | {"image": ["a.png", "b.png"]}
    with pytest.raises(ValueError, match="names 2 images, its text holds 1"):
        llava_data.pieces_of(row, processor)
    with pytest.raises(ValueError, match="beyond max_length=100"):
        conversations(folder, processor, max_length=100)[0]


def test_long_rows_are_cut(folder: Path, processor: Any) -> None:
    sample = conversations(folder, processor, max_length=160)[0]
    assert len(sample["input_ids"]) == len(sample["labels"]) == 160


def test_images_are_padded_to_a_square_of_the_mean_colour(processor: Any) -> None:
    wide = Image.new("RGB", (40, 20), "red")
    square = llava_data.squared(wide, processor.image_processor)
    assert square.size == (40, 40)
    assert square.getpixel((0, 0)) == (127, 127, 127)
    assert square.getpixel((20, 20)) == (255, 0, 0)


SMALL = ["--demo-samples", "16", "--batch", "4", "--micro-batch", "2", "--backend", "eager"]


def test_four_steps_from_data_to_a_saved_model(tmp_path: Path) -> None:
    train_llava.main([*SMALL, "--output", str(tmp_path), "--max-steps", "4", "--group-by-length"])
    assert (tmp_path / "checkpoint-4" / "hidrop.json").is_file()
    model = train_llava.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    shipped = train_llava.LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    pairs = zip(model.named_parameters(), shipped.named_parameters(), strict=True)
    changed = {name.split(".")[1] for (name, new), (_, old) in pairs if not torch.equal(new, old)}
    assert changed == {"multi_modal_projector", "language_model"}
    hidrop.load(model, tmp_path, backend="eager")
    assert hidrop.is_compiled(model)


def test_steps_under_two_schedules_and_what_one_teaches(tmp_path: Path) -> None:
    dual = ["--dual", "0.5", "--distill", "fast_from_full", "--seed", "108"]
    train_llava.main([*SMALL, *dual, "--output", str(tmp_path), "--max-steps", "2"])
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    fast, full, *_ = (line for line in state["log_history"] if "loss" in line)
    assert {"loss_fast", "kl_fast"} <= fast.keys()
    assert fast["loss"] == pytest.approx(fast["loss_fast"] + fast["kl_fast"], rel=1e-3)
    assert full["loss"] == pytest.approx(full["loss_full"], rel=1e-3)
    assert "kl_full" not in full
    saved = json.loads((tmp_path / "hidrop.json").read_text())
    assert "fast" in str(saved)
    with pytest.raises(SystemExit):
        train_llava.parsed(["--distill", "none"])
    with pytest.raises(SystemExit):
        train_llava.parsed(["--dual", "0.9", "--schedule", "none"])


def test_a_step_has_the_rows_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_llava.parsed(["--batch", "96", "--micro-batch", "48"]).micro_batch == 48
    with pytest.raises(SystemExit):
        train_llava.parsed(["--batch", "128", "--micro-batch", "48"])  # three halves of a step
    assert "--batch 128 is no multiple of --micro-batch 48 on 1 devices" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_llava.parsed(["--batch", "16"]).micro_batch == 4
    with pytest.raises(SystemExit):
        train_llava.parsed(["--batch", "2"])


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [*SMALL, "--output", str(tmp_path), "--schedule", "none", "--save-every", "2"]
    train_llava.main([*command, "--max-steps", "2"])
    train_llava.main([*command, "--max-steps", "4", "--resume"])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("command", "trained", "rates"),
    [
        (["--stage", "1"], {"multi_modal_projector"}, {"projector": 1e-3}),
        (
            ["--stage", "2"],
            {"multi_modal_projector", "language_model"},
            {"projector": 2e-5, "model": 2e-5},
        ),
        (
            ["--lora"],
            {"multi_modal_projector", "language_model"},
            {"projector": 2e-5, "model": 2e-4},
        ),
    ],
)
def test_a_stage_trains_what_the_recipe_says(
    command: list[str], trained: set[str], rates: dict[str, float]
) -> None:
    options = train_llava.parsed([*command, "--schedule", "none", "--data", "rows.json"])
    model = train_llava.LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    model = train_llava.prepared(model, options)
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    parts = {"multi_modal_projector", "language_model", "vision_tower"}
    assert {part for part in parts if any(part in name for name in names)} == trained
    assert all("lora" in name for name in names if options.lora and "language_model" in name)
    groups = {group["name"]: group["lr"] for group in train_llava.parameter_groups(model, options)}
    assert groups == rates
    assert options.batch == {1: 256, 2: 128}[options.stage]
