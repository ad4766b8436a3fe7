"""What is read off a class, and what is refused because it cannot be."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import hidrop_fx as hidrop
from hidrop_fx import models
from hidrop_fx.models import DECLARED, DEPARTURES, FAMILIES, Modality, family_of, forward_code
from hidrop_fx.models.encoding import encode
from hidrop_fx.models.items import closed_runs, runs
from tests.support.families import CASES, IMAGE, ROWS, VIDEO, make_batch
from tests.support.families.case import IMAGE_TOKEN, random_model, text_config
from tests.support.families.tiles import step3p7
from tests.support.families.towers import siglip
from tests.support.generation import KEEPS_IMAGES_TOGETHER
from tests.support.models import batch, tiny_llava
from tests.support.runtimes import compiled_eagerly


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("LlavaModel", ()),
        ("Qwen2VLModel", ()),
        ("Idefics3Model", ()),
        ("Gemma3Model", ("masks", "words")),
        ("PaliGemmaModel", ("position_ids", "masks", "words")),
        ("Kimi_K25Model", ("words",)),
        ("MuseSparkModel", ("words",)),
        ("Qwen3VLModel", ("visual_pos_masks", "deepstack_visual_embeds")),
        ("Ernie4_5_VLMoeModel", ("moe_mm_token_type_ids",)),
        ("Granite4VisionModel", ("embeddings", "vision_mask", "deepstack_features")),
        ("Molmo2Model", ("embeddings", "masks")),
        ("Ovis2Model", ("embeddings",)),
        ("Gemma3nModel", ("embeddings", "per_layer_inputs")),
    ],
)
def test_steps_beyond_the_common_course_are_found(name: str, steps: tuple[str, ...]) -> None:
    if not hasattr(hf, name):
        pytest.skip(f"this transformers has no {name}")
    assert set(forward_code.steps_of(getattr(hf, name))) == set(steps)


def test_a_departure_is_a_file_of_at_most_eighty_lines_that_the_docs_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "model-families.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\S+\) \| (\d+) \|", page, re.MULTILINE)
    made = [*DEPARTURES.values(), *DECLARED.values()]
    files = {Path(inspect.getsourcefile(found) or "") for found in made}
    lengths = {file.stem: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: int(lines) for name, lines in listed} == lengths
    assert max(lengths.values()) <= 80


@pytest.mark.skipif(
    not KEEPS_IMAGES_TOGETHER, reason="classes of transformers before 5.23 have others"
)
def test_steps_behind_the_head_are_the_class_s_own() -> None:
    rows = torch.randn(2, 3, 5)
    assert forward_code.logit_steps(hf.LlavaForConditionalGeneration) is None
    text = SimpleNamespace(final_logit_softcapping=2.0, logits_scaling=4.0)
    model = SimpleNamespace(
        config=SimpleNamespace(text_config=text, get_text_config=lambda: text), logit_scale=0.5
    )
    expected = {
        "PaliGemmaForConditionalGeneration": torch.tanh(rows / 2) * 2,
        "Granite4VisionForConditionalGeneration": rows / 4,
        "HyperCLOVAXVisionV2ForConditionalGeneration": rows * 4,
        "CohereCompassForConditionalGeneration": rows * 0.5,
    }
    for name, logits in expected.items():
        steps = forward_code.logit_steps(getattr(hf, name))
        assert steps is not None
        torch.testing.assert_close(steps(model, rows), logits)


def gemma3() -> Any:
    config = hf.Gemma3Config(
        text_config=text_config(hf.Gemma3TextConfig), vision_config=siglip(), mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.Gemma3ForConditionalGeneration, config)


def blip2() -> Any:
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = hf.Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 16},
        text_config=hf.OPTConfig(
            vocab_size=120, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16,
        ).to_dict(),
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            gemma3,
            r"Gemma3Model\.forward embeds other ids .* makes attention masks of its own.*declare it",
        ),
        (blip2, r"Blip2ForConditionalGeneration has no base model under \.model"),
    ],
    ids=["gemma3", "blip2"],
)
def test_a_class_that_does_more_is_refused_by_that_step(
    make: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 3 would be, if no file said what its masks are."""
    monkeypatch.delitem(models.DEPARTURES, "Gemma3ForConditionalGeneration")
    model = make()
    with pytest.raises(hidrop.UnsupportedModelError, match=message):
        hidrop.compile(model, "exit=1", backend="eager")
    assert not hidrop.is_compiled(model)


def test_a_class_that_was_not_tried_says_what_was_inferred(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "_KNOWN", frozenset())
    model = CASES["llava_next_video"].make()
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        family_of(model)
        family_of(model)
    lines = [r.getMessage() for r in caplog.records if "inferred" in r.getMessage()]
    assert len(lines) == 1
    assert "images at token 110 from pixel_values" in lines[0]
    assert "videos at token 111 from pixel_values_videos" in lines[0]


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    FAMILIES.clear()


def test_a_family_may_be_registered(registered: None) -> None:
    model = tiny_llava()
    inputs = batch(model, [[5, "<image>", 6]])
    with torch.no_grad():
        expected = model(**inputs).logits
    own = replace(family_of(model), logits=lambda model, rows: rows / 2)
    FAMILIES["LlavaForConditionalGeneration"] = own
    with compiled_eagerly(model, hidrop.Schedule()), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected / 2, atol=1e-5, rtol=1e-5)


def test_items_are_counted_as_they_were_given() -> None:
    ids = torch.tensor([[9, 1, 1, 8, 1, 1, 9, 9, 1, 1], [1, 1, 1, 7, 7, 7, 7, 7, 7, 7]])
    places = ids == 1
    assert runs(ids, places) == [3, 1]
    assert runs(ids, places, gap=1) == [2, 1]
    assert runs(ids, torch.zeros_like(places)) == [0, 0]
    assert closed_runs(ids, places) == [2, 1]  # the last run follows a 9, as the first one does
    with pytest.raises(hidrop.InputError, match="pass input_ids"):
        closed_runs(None, places)


@pytest.mark.parametrize(
    ("name", "missing"), [("llava_next_video", "image_sizes"), ("qwen2_5_vl", "image_grid_thw")]
)
def test_an_argument_that_the_encoder_needs_is_named(name: str, missing: str) -> None:
    case = CASES[name]
    model = case.make()
    inputs = make_batch(case, model, ROWS).inputs
    del inputs[missing]
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with (
        compiled_eagerly(model, hidrop.Schedule()),
        pytest.raises(hidrop.InputError, match=f"cannot encode pixel_values without.*{missing}"),
    ):
        model(**inputs)


@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError])
def test_whatever_an_encoder_raises_without_an_argument_the_argument_is_named(
    error: type[Exception],
) -> None:
    """Gemma 4's raises a ValueError of its own without `num_frames_per_video`."""

    def without_frames(base: Any, given: dict[str, Any]) -> Any:
        raise error("frames")

    kind = Modality(
        name="video", token=lambda config: 7, inputs=("pixels", "frames"), encode=without_frames
    )
    family = SimpleNamespace(modalities=(kind,), deepstack=None)
    with pytest.raises(
        hidrop.InputError, match=r"cannot encode pixels without one of frames \(frames\)"
    ):
        encode(family, None, {"pixels": torch.zeros(1)})
    with pytest.raises(error, match="frames"):
        encode(family, None, {"pixels": torch.zeros(1), "frames": 2})


def test_bad_calls_are_named() -> None:
    case = CASES["qwen2_5_vl"]
    model = case.make()
    whole = make_batch(case, model, [[5, IMAGE, 6], [5, VIDEO, 6]]).inputs
    typed = {**whole, "input_ids": whole["input_ids"].clone()}
    typed["input_ids"][0, -1] = 111
    no_video = {k: v for k, v in whole.items() if "video" not in k}
    no_video["position_ids"] = torch.arange(whole["input_ids"].shape[1])[None]
    typed["position_ids"] = no_video["position_ids"]
    with compiled_eagerly(model, hidrop.Schedule(prune={1: 2})):
        with pytest.raises(
            hidrop.InputError, match=r"9 video placeholder tokens.*videos have 8 features"
        ):
            model(**typed)
        with pytest.raises(
            hidrop.InputError, match=r"row 1 has 8 video placeholder tokens but .*no videos"
        ):
            model(**no_video)


@pytest.mark.skipif(not hasattr(hf, "Step3p7Config"), reason="this transformers has no Step 3.7")
def test_experts_that_are_called_in_a_loop_are_refused_by_their_place() -> None:
    """Step 3.7 has no experts interface, and which experts a batch has is in its values."""
    model = step3p7()
    with (
        compiled_eagerly(model, hidrop.Schedule()),
        pytest.raises(
            hidrop.CaptureError,
            match=r"could not trace Step3p7TextModel, at layers\.1\.mlp\.experts",
        ),
    ):
        model(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("positions", ["compact", "group"])
def test_rules_that_renumber_have_no_meaning_on_three_axes(positions: str) -> None:
    model = CASES["qwen2_5_vl"].make()
    schedule = hidrop.Schedule(prune={1: 2}, positions=positions)
    with pytest.raises(hidrop.ScheduleError, match=f"positions='{positions}'.*3 axes.*persistent"):
        hidrop.compile(model, schedule, backend="eager")
    assert not hidrop.is_compiled(model)
