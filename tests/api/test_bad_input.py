"""Every mistake is answered by a HidropError that names the value and the remedy, and does no harm.

Over 400 lines: one table of mistakes and messages, held against one model that must stay unharmed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama import MllamaTextConfig, MllamaVisionConfig

import hidrop_fx as hidrop
from tests.support.models import IMAGE, IMAGE_TOKEN, PRUNED, Make, batch, tiny_llava

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8], [8, IMAGE], [3, 4, 5, 6]]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Known(NamedTuple):
    model: Any
    inputs: dict[str, Tensor]


def outcome(model: Any) -> list[list[int]]:
    inputs = batch(model, ROWS)
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None).tolist()


@pytest.fixture(scope="module")
def expected(compiled: Make) -> list[list[int]]:
    return outcome(compiled())


@pytest.fixture
def known(compiled: Make, expected: list[list[int]]) -> Iterator[Known]:
    """A compiled model and good inputs; after the test it must generate what it did before."""
    model = compiled()
    yield Known(model, batch(model, ROWS))
    assert outcome(model) == expected


@pytest.fixture
def untouched(plain: Make) -> Iterator[Any]:
    """A model that is to stay HF's."""
    model = tiny_llava()
    attributes = set(model.__dict__), set(model.model.__dict__)
    yield model
    assert not hidrop.is_compiled(model)
    assert (set(model.__dict__), set(model.model.__dict__)) == attributes
    assert outcome(model) == outcome(plain())


# compile and restore.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inject": 2, "exit": 2}, r"inject=2 is not before exit=2.*smaller inject"),
        ({"inject": 3, "prune": {2: 5}}, r"prune layer 2 lies before inject=3.*move the entry"),
        ({"prune": {2: 5}, "exit": 2}, r"prune layer 2 is not before exit=2.*drop the entry"),
        ({"prune": {1: 3, 2: 5}}, r"keep grows from 3 at prune layer 1 to 5.*use at most 3"),
        ({"prune": {1: 0}}, r"keep 0 at prune layer 1.*int >= 1, or exit=1"),
        ({"prune": {1: 1.5}}, r"keep 1\.5 at prune layer 1.*float in \(0, 1\]"),
        ({"inject": -1}, r"inject=-1 is too small: use an integer >= 0"),
        ({"positions": "absolute"}, r"positions='absolute'.*choose one of persistent"),
        ({"score": "best"}, r"score='best'.*choose one of last_token"),
    ],
    ids=str,
)
def test_a_schedule_that_contradicts_itself_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(hidrop.ScheduleError, match=message):
        hidrop.Schedule(**arguments)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (hidrop.Schedule(inject=4), r"inject=4 but the model has 4 layers.*use inject <= 3"),
        (hidrop.Schedule(prune={7: 3}), r"prune layer 7 but the model has 4 layers.*layer 3"),
        (hidrop.Schedule(exit=5), r"exit=5 but the model has 4 layers: use exit <= 4"),
        ("exit=5", r"exit=5 but the model has 4 layers: use exit <= 4"),
        ("hidrop-64", r"num_layers=4 is too small for preset hidrop-64.*write a schedule"),
        ("inject:2", r"cannot read 'inject:2'.*write \"inject=8"),
        ({"inject": 2}, r"in the schedule 'inject': schedule is a int; pass a hidrop_fx\.Schedule"),
        (None, r"schedule is a NoneType; pass a hidrop_fx\.Schedule"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_the_model_is_refused(
    untouched: Any, schedule: Any, message: str
) -> None:
    with pytest.raises(hidrop.ScheduleError, match=message):
        hidrop.compile(untouched, schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, r"backend='tensorrt'; use one of inductor, aot_eager, eager"),
        ({"lowering": "layers"}, r"lowering='layers'; use one of bodies, whole, or None"),
        ({"cuda_graphs": "no"}, r"cuda_graphs='no'; use one of True, False$"),
        ({"fused_loss": "auto"}, r"fused_loss='auto'; use one of True, False$"),
        ({"overlap_vision": 1}, r"overlap_vision=1; use one of True, False, or None"),
        ({"activation_memory_budget": "half"}, r"='half'; use a share in \(0, 1\], or None"),
    ],
    ids=str,
)
def test_an_unknown_option_is_refused(
    untouched: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.compile(untouched, "exit=2", **options)


def test_a_failed_compile_leaves_the_old_one_in_force(known: Known) -> None:
    with pytest.raises(hidrop.ScheduleError, match="exit=9"):
        hidrop.compile(known.model, hidrop.Schedule(exit=9), backend="eager")
    assert hidrop.is_compiled(known.model)


def text_model() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=20, num_key_value_heads=2))


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SMALL, projection_dim=16, image_size=8, patch_size=4)


def other_vlm() -> Any:
    text = MllamaTextConfig(
        **SMALL, vocab_size=20, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0
    )
    vision = MllamaVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=8, patch_size=4, vision_output_dim=32, max_num_tiles=1, intermediate_layers_indices=[1],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=19)
    return MllamaForConditionalGeneration(config)


def recurrent_backbone() -> Any:
    text = MiniMaxConfig(**SMALL, vocab_size=20, num_key_value_heads=2, num_local_experts=2)
    config = LlavaConfig(text_config=text, vision_config=vision_config(), image_token_index=19)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text_model, r"LlamaForCausalLM is not a vision-language model.*no vision tokens"),
        (other_vlm, r"MllamaForConditionalGeneration has no get_image_features.*cross-attention"),
        (
            recurrent_backbone,
            r"MiniMaxModel has layers of type 'linear_attention'; .*or linear_attention by the gated delta rule or a state space",
        ),
        (
            lambda: nn.Linear(2, 2),
            r"Linear is not a transformers generation model.*from_pretrained",
        ),
        (lambda: tiny_llava().model, r"LlavaModel is not a transformers generation model"),
        (lambda: None, r"NoneType is not a transformers generation model.*from_pretrained"),
    ],
    ids=["text", "other VLM", "recurrent layers", "module", "base model", "None"],
)
def test_a_model_that_cannot_be_compiled_is_refused_and_unchanged(
    make: Callable[[], Any], message: str
) -> None:
    model = make()
    attributes = set(getattr(model, "__dict__", ()))
    with pytest.raises(hidrop.UnsupportedModelError, match=message):
        hidrop.compile(model, "exit=1")
    assert set(getattr(model, "__dict__", ())) == attributes
    assert not hidrop.is_compiled(model)


def test_restoring_a_model_that_is_not_compiled_is_refused(untouched: Any) -> None:
    with pytest.raises(
        hidrop.HidropError, match=r"LlavaForCond.* is not compiled.*nothing to rest"
    ):
        hidrop.restore(untouched)


def test_restore_after_a_bad_input_gives_hf(untouched: Any) -> None:
    hidrop.compile(untouched, PRUNED, backend="eager")
    with pytest.raises(hidrop.InputError):
        untouched(**batch(untouched, ROWS), output_attentions=True)
    hidrop.restore(untouched)


# Images.


def assert_refused(
    known: Known,
    error: type[hidrop.HidropError],
    message: str,
    *,
    generate: bool = True,
    **changes: Any,
) -> None:
    """Forward, and generate, both refuse the changed inputs; None takes an input away."""
    inputs = {k: v for k, v in (known.inputs | changes).items() if v is not None}
    with pytest.raises(error, match=message):
        known.model(**inputs)
    if generate:
        with pytest.raises(error, match=message):
            known.model.generate(**inputs, max_new_tokens=2)


def test_placeholders_without_images_are_refused(known: Known) -> None:
    message = r"row 0 has 9 image placeholder tokens but the call has no images; pass pixel_values"
    assert_refused(known, hidrop.InputError, message, pixel_values=None)


@pytest.mark.parametrize("images", [1, 3])
def test_more_or_fewer_images_than_placeholders_are_refused(known: Known, images: int) -> None:
    pixels = known.inputs["pixel_values"][:1].repeat(images, 1, 1, 1)
    message = (
        r"18 image placeholder tokens \(\[9, 9, 0\] by row\), but the images have "
        rf"{9 * images} features \({images} images of \[9\].*the model's processor"
    )
    assert_refused(known, hidrop.InputError, message, pixel_values=pixels)


def test_images_without_placeholders_are_refused(known: Known) -> None:
    text = torch.tensor([[3, 4, 5]])
    message = r"prompt has 0 image placeholder tokens.*18 features.*one image for each <image>"
    mask = torch.ones_like(text)
    assert_refused(known, hidrop.InputError, message, input_ids=text, attention_mask=mask)


def test_a_row_truncated_within_an_image_is_refused(known: Known) -> None:
    """The totals agree, the rows do not: no image may be split over two rows."""
    rows = torch.full((2, 12), IMAGE_TOKEN)
    rows[0, :4] = 5
    rows[1, :2] = 6
    message = r"row 0 has 8 image placeholder tokens.*whole number of images.*truncated"
    assert_refused(
        known,
        hidrop.InputError,
        message,
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        pixel_values=known.inputs["pixel_values"],
    )


def test_pixels_and_ready_features_at_once_are_refused(known: Known) -> None:
    pixels = known.inputs["pixel_values"]
    with torch.no_grad():
        features = known.model.model.get_image_features(pixel_values=pixels, return_dict=True)
    assert_refused(
        known,
        hidrop.InputError,
        r"either pixel_values or mm_encoder_outputs, not both",
        generate=False,
        mm_encoder_outputs={"image": features},
    )


def test_a_new_image_behind_a_filled_cache_is_refused(known: Known) -> None:
    with torch.no_grad():
        cache = known.model(**known.inputs).past_key_values
    message = r"images came with a cache that holds a prompt.*past_key_values=None"
    assert_refused(known, hidrop.InputError, message, generate=False, past_key_values=cache)
    assert cache.get_seq_length() == known.inputs["input_ids"].shape[1]


# Ids, masks, labels.


def test_ids_and_embeddings_at_once_are_refused(known: Known) -> None:
    embeds = known.model.get_input_embeddings()(known.inputs["input_ids"])
    message = r"pass exactly one of input_ids and inputs_embeds"
    assert_refused(known, hidrop.InputError, message, generate=False, inputs_embeds=embeds)
    assert_refused(known, hidrop.InputError, message, generate=False, input_ids=None)


def test_a_cache_without_ids_or_embeddings_is_refused(known: Known) -> None:
    with torch.no_grad():
        cache = known.model(**known.inputs).past_key_values
    length = cache.get_seq_length()
    for arguments in (
        {},
        {"input_ids": torch.ones(3, 1).long(), "inputs_embeds": torch.ones(3, 1, 32)},
    ):
        with pytest.raises(
            hidrop.InputError, match=r"pass exactly one of input_ids and inputs_emb"
        ):
            known.model(**arguments, past_key_values=cache)
    assert cache.get_seq_length() == length


def test_a_row_of_padding_alone_is_refused(known: Known) -> None:
    mask = known.inputs["attention_mask"].clone()
    mask[2] = 0
    message = r"row 2 of the batch is padding only; remove it"
    assert_refused(known, hidrop.InputError, message, attention_mask=mask)


def test_a_four_dimensional_mask_is_refused(known: Known) -> None:
    length = known.inputs["input_ids"].shape[1]
    mask = torch.ones(3, 1, length, length).tril().bool()
    message = rf"attention_mask has shape \(3, 1, {length}, {length}\).*2-D mask.*\(3, {length}\)"
    assert_refused(known, hidrop.InputError, message, generate=False, attention_mask=mask)


def test_a_mask_of_another_length_is_refused(known: Known) -> None:
    length = known.inputs["input_ids"].shape[1]
    mask = torch.ones(3, length + 1)
    message = rf"attention_mask has shape \(3, {length + 1}\).*\(3, {length}\)"
    assert_refused(known, hidrop.InputError, message, generate=False, attention_mask=mask)


def test_labels_of_another_shape_are_refused(known: Known) -> None:
    message = r"labels have shape \(3, 4\), input_ids \(3, "
    labels = torch.ones(3, 4, dtype=torch.long)
    assert_refused(known, hidrop.InputError, message, generate=False, labels=labels)


def test_output_attentions_are_refused(known: Known) -> None:
    name = "output_attentions"
    message = rf"{name}=True is not available.*hidrop\.restore\(model\)"
    assert_refused(known, hidrop.InputError, message, generate=False, **{name: True})
    with pytest.raises(hidrop.InputError, match=message):
        known.model.generate(
            **known.inputs, max_new_tokens=2, return_dict_in_generate=True, **{name: True}
        )
    with pytest.raises(hidrop.InputError, match=message):
        known.model.model(**known.inputs, **{name: True})


def test_output_attentions_by_config_are_refused() -> None:
    """transformers reads this from the config as well; it may not be dropped silently."""
    name = "output_attentions"
    model = hidrop.compile(tiny_llava(), PRUNED, backend="eager")
    before = outcome(model)
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation = "eager"
        setattr(config, name, True)
    with pytest.raises(hidrop.InputError, match=rf"{name}=True is not available"):
        model(**batch(model, ROWS))
    for config in (model.config, model.config.get_text_config()):
        setattr(config, name, False)
        config._attn_implementation = "sdpa"
    assert outcome(model) == before


# generate and caches.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prefill_chunk_size": 4},
            hidrop.InputError,
            r"prefill_chunk_size=4.*leave prefill_chunk_size unset",
        ),
        (
            {"cache_implementation": "static"},
            hidrop.CacheError,
            r"cache_implementation='static'.*leave cache_implementation unset",
        ),
        (
            {"cache_implementation": "quantized"},
            hidrop.CacheError,
            r"cache_implementation='quantized'.*leave cache_implementation unset",
        ),
    ],
    ids=str,
)
def test_unsupported_options_of_generate_are_refused(
    known: Known, options: dict[str, Any], error: type[hidrop.HidropError], message: str
) -> None:
    with pytest.raises(error, match=message):
        known.model.generate(**known.inputs, max_new_tokens=2, **options)


def test_a_cache_of_another_class_is_refused(known: Known) -> None:
    for cache in (DynamicCache(), DynamicCache(config=known.model.config.get_text_config())):
        message = r"past_key_values is a DynamicCache.*only the cache that"
        assert_refused(known, hidrop.CacheError, message, past_key_values=cache)


def test_a_compiled_models_cache_is_refused_by_another_model(known: Known, plain: Make) -> None:
    with torch.no_grad():
        cache = known.model(**known.inputs).past_key_values
        with pytest.raises(
            hidrop.CacheError, match=r"cannot serve another model.*past_key_values=N"
        ):
            plain()(input_ids=torch.tensor([[3]] * 3), past_key_values=cache)


def test_a_cache_of_another_batch_size_is_refused(known: Known) -> None:
    with torch.no_grad():
        cache = known.model(**known.inputs).past_key_values
    length = cache.get_seq_length()
    with pytest.raises(hidrop.HidropError, match=r"\b2\b.*\b3\b|\b3\b.*\b2\b"):
        known.model(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)
    assert cache.get_seq_length() == length


def test_cropping_into_the_prompt_is_refused(known: Known) -> None:
    with torch.no_grad():
        cache = known.model(**known.inputs).past_key_values
        known.model(input_ids=torch.tensor([[3], [4], [5]]), past_key_values=cache)
    length = cache.get_seq_length()
    with pytest.raises(
        hidrop.CacheError, match=r"cannot crop 2 tokens: 1 came after the prompt.*prefill again"
    ):
        cache.crop(-2)
    assert cache.get_seq_length() == length
    cache.crop(-1)
    assert cache.get_seq_length() == length - 1
