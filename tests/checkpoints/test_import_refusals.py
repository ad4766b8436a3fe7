"""What is missing, unknown, or without a counterpart is refused by name, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

import hidrop_fx as hidrop
from tests.support.models import tiny_llava
from tests.support.original_llava import Original, write_file

Wrong = Callable[[Original], dict[str, Any] | None]


def config(**values: Any) -> Wrong:
    """Write a checkpoint with some keys of its config.json changed; None removes one."""

    def write(original: Original) -> None:
        merged = {**original.config, **values}
        original.config = {key: value for key, value in merged.items() if value is not None}
        original.write()

    return write


def weights(**changed: torch.Tensor | None) -> Wrong:
    """Write a checkpoint with some tensors changed, whose keys have "__" for "."; None removes one."""

    def write(original: Original) -> None:
        new = {key.replace("__", "."): value for key, value in changed.items()}
        found = {**original.text, **original.projector, **new}
        original.write({key: value for key, value in found.items() if value is not None})

    return write


def without(name: str, place: str = "checkpoint") -> Wrong:
    def write(original: Original) -> None:
        original.write()
        (getattr(original, place) / name).unlink()

    return write


def missing_shard(original: Original) -> None:
    original.write(form="sharded safetensors")
    (original.checkpoint / "model-00002-of-00003.safetensors").unlink()


def missing_shard_without_an_index(original: Original) -> None:
    original.write(form="sharded bin")
    (original.checkpoint / "pytorch_model.bin.index.json").unlink()
    (original.checkpoint / "pytorch_model-00003-of-00003.bin").unlink()


def shard_without_its_key(original: Original) -> None:
    original.write(form="sharded bin")
    write_file(original.checkpoint / "pytorch_model-00001-of-00003.bin", {"a": torch.ones(1)})


def code_in_a_file(original: Original) -> None:
    original.write()
    (original.checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("x")}, original.checkpoint / "pytorch_model.bin")


def no_tensors(original: Original) -> None:
    original.write()
    (original.checkpoint / "model.safetensors").unlink()
    torch.save({"epoch": 3}, original.checkpoint / "pytorch_model.bin")


def no_state_dict(original: Original) -> None:
    original.write()
    (original.checkpoint / "model.safetensors").unlink()
    torch.save([1], original.checkpoint / "pytorch_model.bin")


def broken_file(original: Original) -> None:
    original.write()
    (original.checkpoint / "model.safetensors").write_bytes(b"version https://git-lfs")


def other_tower(original: Original) -> None:
    wider = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    original.tower_config["vision_config"] = {**wider.to_dict(), "image_size": 12, "patch_size": 4}
    original.write()


def other_tower_that_the_config_does_not_tell(original: Original) -> None:
    del original.config["mm_hidden_size"]
    other_tower(original)


def siglip(original: Original) -> None:
    original.tower_config = {"model_type": "siglip", "vision_config": {}}
    original.write()


def shallow_tower(original: Original) -> None:
    original.config["mm_vision_select_layer"] = -4
    original.write()


def other_crop(original: Original) -> None:
    original.images["crop_size"] = {"height": 24, "width": 24}
    original.write()


def no_tower(original: Original) -> dict[str, Any]:
    original.write()
    return {"vision_tower": None}


def tower_by_name(original: Original) -> dict[str, Any]:
    original.write()
    return {"vision_tower": "openai/clip-vit-large-patch14-336"}


def trained_tower_that_is_not_there(original: Original) -> None:
    original.config["unfreeze_mm_vision_tower"] = True
    original.write()


def larger_tokenizer(original: Original) -> None:
    original.write()
    path = original.checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more{k}": 97 + k for k in range(5)}
    path.write_text(json.dumps(content))


def broken_tokenizer(original: Original) -> None:
    original.write()
    (original.checkpoint / "tokenizer.json").write_text("{}")


def factors(original: Original, key: str = "q_proj", into: int = 32) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.model.layers.0.self_attn.{key}"
    found = {f"{prefix}.lora_A.weight": torch.ones(2, into)}
    return found | {f"{prefix}.lora_B.weight": torch.ones(32, 2)}


def adapters(change: Callable[[Original], Any] = factors, **options: Any) -> Wrong:
    def write(original: Original) -> dict[str, Any]:
        original.write_adapters(change(original), original.projector, **options)
        return {"base": original.base}

    return write


def adapters_without_base(original: Original) -> None:
    original.write_adapters(factors(original), original.projector)


def adapters_without_projector(original: Original) -> dict[str, Any]:
    original.write_adapters(factors(original), {})
    return {"base": original.base}


def half_of_an_adapter(original: Original) -> dict[str, torch.Tensor]:
    return {key: value for key, value in factors(original).items() if "lora_A" in key}


def adapters_of_embeddings(original: Original) -> dict[str, torch.Tensor]:
    return {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 97)}


def no_adapter_file(original: Original) -> None:
    original.write()
    (original.checkpoint / "adapter_config.json").write_text("{}")


def given(**options: Any) -> Wrong:
    def write(original: Original) -> dict[str, Any]:
        original.write()
        return options

    return write


def missing_directory(original: Original) -> None:
    """Write nothing."""


REFUSED: dict[str, tuple[Wrong, str]] = {
    "an unknown key": (
        weights(model__layers__0__self_attn__q_norm__weight=torch.ones(8)),
        r"model\.safetensors holds 'model\.layers\.0\.self_attn\.q_norm\.weight', which this model has no place for",
    ),
    "a resampler": (
        weights(model__vision_resampler__x=torch.ones(8)),
        r"holds 'model\.vision_resampler\.x'",
    ),
    "a layer more": (
        weights(model__layers__4__mlp__up_proj__weight=torch.ones(8)),
        r"holds 'model\.layers\.4\.mlp\.up_proj\.weight'.* with 4 layers",
    ),
    "a missing key": (
        weights(model__layers__3__mlp__up_proj__weight=None),
        r"no weights for 'language_model\.model\.layers\.3\.mlp\.up_proj\.weight'",
    ),
    "a missing bias": (weights(model__mm_projector__2__bias=None), r"'.*linear_2\.bias'"),
    "no head": (weights(lm_head__weight=None), r"'language_model\.lm_head\.weight'"),
    "another shape": (
        weights(model__norm__weight=torch.ones(31)),
        r"'model\.norm\.weight' has shape \[31\], and \[32\]",
    ),
    "another vocabulary": (config(vocab_size=99), r"embed_tokens\.weight' has shape \[97, 32\]"),
    "a missing shard": (
        missing_shard,
        r"model-00002-of-00003\.safetensors does not exist: model\.safetensors\.index\.json says",
    ),
    "a missing shard, no index": (
        missing_shard_without_an_index,
        r"pytorch_model-00003-of-00003\.bin does not exist: the names",
    ),
    "a shard without its key": (shard_without_its_key, r"-00001-of-00003\.bin does not hold '"),
    "code in a file": (code_in_a_file, r"cannot be read as tensors alone \(weights_only=True\)"),
    "no tensors": (no_tensors, r"pytorch_model\.bin: 'epoch' is a int, not a tensor"),
    "no state dict": (no_state_dict, r"pytorch_model\.bin holds a list"),
    "a broken file": (broken_file, r"model\.safetensors cannot be read: "),
    "no weights": (without("model.safetensors"), r"holds no weights: neither model\.safetensors"),
    "no config": (without("config.json"), r"llava/config\.json does not exist"),
    "no tokenizer": (without("tokenizer.json"), r"no tokenizer in .*llava"),
    "a broken tokenizer": (broken_tokenizer, r"the tokenizer in .* cannot be read: "),
    "another tokenizer": (larger_tokenizer, r"has 102 tokens, and .* vocab_size=97"),
    "another tower": (other_tower, r"mm_hidden_size=32, and the vision tower in .* is 48 wide"),
    "another tower, untold": (
        other_tower_that_the_config_does_not_tell,
        r"pytorch_model\.bin: 'vision_model\..*' has shape",
    ),
    "a tower of smaller images": (
        config(mm_vision_tower="openai/clip-vit-large-patch4-24"),
        r"mm_vision_tower='openai/clip-vit-large-patch4-24', and .* images of 12 pixels in patches of 4",
    ),
    "a tower of smaller images, by default": (
        config(mm_vision_tower="/models/clip-vit-large-patch14/"),
        r"images of 12 pixels in patches of 4; pass the directory of the tower that it was trained with",
    ),
    "a tower of another kind": (siglip, r"model_type='siglip' is no CLIP vision tower"),
    "a shallow tower": (shallow_tower, r"mm_vision_select_layer=-4, and .* has 2 layers"),
    "another crop": (other_crop, r"crop_size=\{'height': 24, 'width': 24\}.*image_size=12"),
    "no tower": (no_tower, r"vision_tower is not given.*'openai/clip-vit-tiny-patch4-12'"),
    "a tower's name": (tower_by_name, r"vision_tower='openai/clip.*' is no directory"),
    "no tower inside": (
        trained_tower_that_is_not_there,
        r"no weights for 'vision_tower\.vision_model\.",
    ),
    "no preprocessor": (
        without("preprocessor_config.json", "tower"),
        r"clip/preprocessor_config\.json does not exist",
    ),
    "a deeper projector": (
        config(mm_projector_type="mlp3x_gelu"),
        r"mm_projector_type='mlp3x_gelu'",
    ),
    "no projector": (config(mm_projector_type="identity"), r"mm_projector_type='identity' has no"),
    "another projector": (config(mm_projector_type="linear"), r"holds 'model\.mm_projector\.2\."),
    "another feature": (config(mm_vision_select_feature="cls"), r"mm_vision_select_feature='cls'"),
    "layers": (config(mm_vision_select_layer=[-2, -5]), r"mm_vision_select_layer=\[-2, -5\]"),
    "tiles": (config(image_aspect_ratio="anyres"), r"image_aspect_ratio='anyres' cuts an image"),
    "more tiles": (config(image_aspect_ratio="anyres_max_9"), r"'anyres_max_9'.*llava-hf"),
    "scales": (config(s2=True), r"s2=True has no counterpart"),
    "a quantised model": (config(quantization_config={"bits": 4}), r"quantization_config="),
    "a resampler's name": (config(mm_resampler_type="perceiver"), r"mm_resampler_type='perceiver'"),
    "MPT": (config(model_type="llava_mpt"), r"model_type='llava_mpt' is not one.*llava_mistral"),
    "VoCo": (config(model_type="llava_llama_voco"), r"model_type='llava_llama_voco'"),
    "Hugging Face's": (
        config(model_type="llava", text_config={}),
        r"Hugging Face's format already",
    ),
    "a text model": (config(mm_vision_tower=None), r"has no mm_vision_tower"),
    "adapters without base": (
        adapters_without_base,
        r"holds adapters and no text model: .*base=.*'lmsys/vicuna-7b-v1\.5'",
    ),
    "adapters without projector": (adapters_without_projector, r"'multi_modal_projector\.linear_1"),
    "DoRA": (adapters(use_dora=True), r"adapter_config\.json: use_dora=True cannot be merged"),
    "several ranks": (adapters(rank_pattern={"q": 4}), r"rank_pattern=\{'q': 4\} cannot"),
    "no rank": (adapters(r=None), r"adapter_config\.json: r=None: adapters are scaled by"),
    "no scale": (adapters(lora_alpha=0), r"lora_alpha=0: adapters are scaled by"),
    "half of an adapter": (
        adapters(half_of_an_adapter),
        r"q_proj\.lora_A\.weight' without its other",
    ),
    "adapters of words": (
        adapters(adapters_of_embeddings),
        r"lora_embedding_A', which is no factor",
    ),
    "another base": (
        adapters(lambda original: factors(original, into=16)),
        r"q_proj\.lora_A\.weight' is \[2, 16\] .* is \[32, 32\]",
    ),
    "an adapter of nothing": (
        adapters(lambda original: factors(original, "qkv")),
        r"'.*qkv\.lora_A\.weight' adapts .* which the base model does not have",
    ),
    "no adapters": (no_adapter_file, r"has adapter_config\.json and none of"),
    "a dtype": (given(dtype="int8"), r"dtype='int8'; use one of"),
    "a size": (given(max_shard_size="2 loads"), r"max_shard_size='2 loads' is no size"),
    "a base that is not there": (given(base="nowhere"), r"base='nowhere' is no directory"),
    "a schedule": (given(schedule="inject=9"), r"inject=9 but the model has 4 layers"),
    "a schedule that reads more": (
        given(schedule="index-preserving"),
        r"needs 'classifier' beside the model",
    ),
    "no checkpoint": (missing_directory, r"checkpoint='.*llava' is no directory"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_is_wrong(name: str, model: Any, tmp_path: Path) -> None:
    wrong, message = REFUSED[name]
    original = Original(tmp_path, model)
    options = wrong(original) or {}
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.import_llava(
            original.checkpoint,
            **{"vision_tower": original.tower, "output": tmp_path / "made", **options},
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_that_no_index_lists_are_read(model: Any, tmp_path: Path) -> None:
    original = Original(tmp_path, model)
    original.write(form="sharded bin")
    (original.checkpoint / "pytorch_model.bin.index.json").unlink()
    hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=tmp_path / "made")


def test_the_index_says_which_shard_holds_a_tensor(model: Any, tmp_path: Path) -> None:
    """A shard may hold another, left there by whoever wrote it."""
    original = Original(tmp_path, model)
    original.write(form="sharded safetensors")
    index = json.loads((original.checkpoint / "model.safetensors.index.json").read_text())
    places = sorted(index["weight_map"].items(), key=lambda item: item[1])
    (key, _), (_, last) = places[0], places[-1]
    path = original.checkpoint / last
    save_file({**load_file(path), key: torch.zeros_like(original.text[key])}, path)
    hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    rows = original.text[key]
    assert torch.equal(made[f"language_model.{key}"][: len(rows)], rows)


def test_files_of_torch_before_1_6_are_read(model: Any, tmp_path: Path) -> None:
    """They cannot be mapped into memory."""
    original = Original(tmp_path, model)
    original.write()
    (original.checkpoint / "model.safetensors").unlink()
    torch.save(
        {**original.text, **original.projector},
        original.checkpoint / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=tmp_path / "made")


def test_unknown_keys_of_a_config_are_told(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = Original(tmp_path, model)
    original.config["mm_token_merging"] = 3
    original.write()
    done = hidrop.import_llava(
        original.checkpoint, vision_tower=original.tower, output=tmp_path / "made"
    )
    assert "mm_token_merging" in done.notes[-1]
    assert "mm_token_merging" in caplog.text
    assert len([line for line in done.notes if "not known" in line]) == 1


def test_known_keys_are_carried_over_without_a_word(model: Any, tmp_path: Path) -> None:
    original = Original(tmp_path, model)
    original.write()
    done = hidrop.import_llava(
        original.checkpoint, vision_tower=original.tower, output=tmp_path / "made"
    )
    assert not any("not known" in line for line in done.notes)
