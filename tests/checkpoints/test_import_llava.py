"""A checkpoint in LLaVA's original format, written from a random Hugging Face model, gives that model's logits when imported."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

import hidrop_fx as hidrop
from tests.support.models import IMAGE as MARK
from tests.support.models import IMAGE_TOKEN, VOCAB, batch, tiny_llava
from tests.support.original_llava import Original, imported, write_file

ROWS: list[list[int | str]] = [[1, 6, MARK, 7, 8, 9], [1, MARK, 9]]


@torch.no_grad()
def assert_same(model: Any, original: LlavaForConditionalGeneration, atol: float = 0) -> None:
    """Compare the logits of the words that both have; the image token of the imported model is another."""
    inputs = batch(original, ROWS)
    expected = original(**inputs).logits
    ids = inputs["input_ids"]
    found = model(
        **{**inputs, "input_ids": torch.where(ids == IMAGE_TOKEN, model.config.image_token_id, ids)}
    ).logits
    assert found.shape[-1] > VOCAB
    torch.testing.assert_close(found[..., :VOCAB], expected, atol=atol, rtol=0)


@pytest.fixture
def original(tmp_path: Path) -> Original:
    return Original(tmp_path, tiny_llava())


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_logits_are_those_of_the_original(original: Original, form: str) -> None:
    original.write(form=form)
    model, done = imported(original, max_shard_size="20KB")
    assert_same(model, original.model)
    index = json.loads((done.directory / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 3
    assert {path.name for path in done.directory.glob("*.safetensors")} == files
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("backbone", ["mistral", "qwen2"])
def test_other_text_models(tmp_path: Path, backbone: str) -> None:
    """Also with frequencies that are not the class's own, tied words, and the older spelling of both."""
    rope = {"rope_type": "default", "rope_theta": 77.0}
    original = Original(tmp_path, tiny_llava(backbone, kv_heads=2))
    made = original.model
    made.config.text_config.rope_parameters = rope
    made.model.language_model.rotary_emb.__init__(made.config.text_config)
    original.config["rope_theta"] = 77.0
    if backbone == "qwen2":
        made.lm_head.weight.data = made.model.language_model.embed_tokens.weight.data
        original.config["tie_word_embeddings"] = True
        del original.text["lm_head.weight"]
    original.write()
    model, _ = imported(original)
    assert type(model.model.language_model).__name__.lower().startswith(backbone)
    assert_same(model, made)


def test_vocabulary_is_that_of_llava_hf(original: Original) -> None:
    """32000 -> 32064 with <image> at 32000 and <pad> at 32001; here 97 -> 128."""
    original.write()
    model, done = imported(original)
    tokenizer = AutoProcessor.from_pretrained(done.directory).tokenizer
    assert done.vocab_size == model.get_input_embeddings().weight.shape[0] == 128
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == 128
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == VOCAB
    assert tokenizer.pad_token_id == model.config.text_config.pad_token_id == VOCAB + 1
    assert model.generation_config.pad_token_id == VOCAB + 1
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    words = original.text["model.embed_tokens.weight"]
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        spread = (weight.detach()[VOCAB:] - words.mean(dim=0)).square().mean().sqrt()
        of_script = (1e-5 * words.var(dim=0, unbiased=False)).mean().sqrt()
        assert spread == pytest.approx(of_script.item(), rel=0.1)
    assert _rows_of(32000) == 32064


def _rows_of(words: int) -> int:
    from hidrop_fx.checkpoints.vocabulary import padded_rows

    return padded_rows(words, range(words + 2))


def test_drawn_rows_have_the_covariance_of_the_conversion_script() -> None:
    """Variance 1e-5 of the embedding's, correlations as in it, over many draws."""
    from hidrop_fx.checkpoints.vocabulary import new_rows

    torch.manual_seed(0)
    embedding = torch.randn(300, 6) @ torch.randn(6, 6) + 3
    drawn = new_rows(embedding.half(), 20000)
    assert torch.equal(drawn, new_rows(embedding.half(), 20000))
    expected = 1e-5 * torch.cov(embedding.half().float().T, correction=0)
    assert torch.allclose(drawn.mean(dim=0), embedding.half().float().mean(dim=0), atol=5e-4)
    assert torch.allclose(torch.cov(drawn.T), expected, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize(("feature", "strategy"), [("patch", "default"), ("cls_patch", "full")])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_tower_is_read_where_the_config_says(
    tmp_path: Path, feature: str, strategy: str, layer: int
) -> None:
    tokens = 9 + (strategy == "full")
    made = tiny_llava(
        vision_feature_select_strategy=strategy, vision_feature_layer=layer, image_seq_length=tokens
    )
    original = Original(tmp_path, made)
    original.config |= {"mm_vision_select_feature": feature, "mm_vision_select_layer": layer}
    original.write()
    model, _ = imported(original)
    assert model.config.image_seq_length == tokens
    inputs = batch(made, ROWS)
    with torch.no_grad():
        expected = made.get_image_features(inputs["pixel_values"]).pooler_output
        found = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert len(expected[0]) == tokens
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("numbered", [True, False])
def test_a_linear_projector(original: Original, numbered: bool) -> None:
    """One matrix, which is what the model computes; LLaVA calls it mm_projector.weight, or .0.weight in early files."""
    projector = {key: v for key, v in original.projector.items() if ".0." in key}
    made = original.model
    second = made.model.multi_modal_projector.linear_2
    second.weight.data, second.bias.data = torch.eye(32), torch.zeros(32)
    made.model.multi_modal_projector.act = torch.nn.Identity()
    if not numbered:
        projector = {key.replace(".0.", "."): value for key, value in projector.items()}
    original.config["mm_projector_type"] = "linear"
    original.write({**original.text, **projector})
    model, done = imported(original)
    assert_same(model, made)
    assert any("linear" in note for note in done.notes)


def test_the_tower_that_was_trained_is_inside_the_checkpoint(original: Original) -> None:
    original.config["unfreeze_mm_vision_tower"] = True
    weights = {**original.text, **original.projector, **original.inside()}
    original.vision = {key: value + 1 for key, value in original.vision.items()}
    original.write(weights)
    model, _ = imported(original)
    assert_same(model, original.model)


def test_a_tower_that_was_not_trained_is_its_directorys(original: Original) -> None:
    """As LLaVA's loader does; the checkpoint's copy is the same in all that its authors release."""
    inside = {key: value + 1 for key, value in original.inside().items()}
    original.write({**original.text, **original.projector, **inside})
    model, done = imported(original)
    assert_same(model, original.model)
    assert any(str(original.tower) in note for note in done.notes)


def test_a_tower_directory_without_weights(original: Original) -> None:
    original.write({**original.text, **original.projector, **original.inside()})
    (original.tower / "pytorch_model.bin").unlink()
    model, _ = imported(original)
    assert_same(model, original.model)


def test_the_config_may_name_a_directory(original: Original) -> None:
    original.config["mm_vision_tower"] = str(original.tower)
    original.write()
    model, _ = imported(original, vision_tower=None)
    assert_same(model, original.model)


def lora(
    original: Original, form: str, rank: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Factors for two weights of each layer, in either spelling of their keys, and what they add, unscaled."""
    factors, added = {}, {}
    middle = {"peft": "", "named_parameters": ".default"}[form]
    torch.manual_seed(1)
    for k in range(4):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            key = f"model.layers.{k}.{name}"
            out, into = original.text[f"{key}.weight"].shape
            down, up = torch.randn(rank, into) * 0.1, torch.randn(out, rank) * 0.1
            prefix = f"base_model.model.{key}"
            factors[f"{prefix}.lora_A{middle}.weight"] = down
            factors[f"{prefix}.lora_B{middle}.weight"] = up
            added[f"{key}.weight"] = up @ down
    return factors, added


@pytest.mark.parametrize("form", ["peft", "named_parameters"])
@pytest.mark.parametrize(("options", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_adapters_are_merged(original: Original, form: str, options: Any, scale: float) -> None:
    factors, added = lora(original, form)
    original.write_adapters(factors, original.projector, **options)
    state = original.model.state_dict()
    for key, value in added.items():
        state[key.replace("model.", "model.language_model.", 1)] += scale * value
    model, _ = imported(original, base=original.base)
    assert_same(model, original.model, atol=1e-4)


def test_adapters_are_merged_as_peft_merges_them(original: Original) -> None:
    """In fp16, as the authors' loader: equal but for one rounding."""
    peft = pytest.importorskip("peft")
    original.config["torch_dtype"] = "float16"
    half = original.model.half()
    original = Original(original.checkpoint.parent, half)
    original.config["torch_dtype"] = "float16"
    text = half.model.language_model
    tuned = peft.get_peft_model(
        text, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj", "up_proj"])
    )
    factors = {}
    torch.manual_seed(2)
    for key, value in tuned.state_dict().items():
        if "lora_" in key:
            value.copy_(torch.randn_like(value) * 0.1)
            name = key.replace("base_model.model.", "base_model.model.model.").replace(
                ".default", ""
            )
            factors[name] = value.clone()
    plain = {k: v for k, v in original.text.items()}
    original.text = {k: v.clone() for k, v in plain.items()}
    original.write_adapters(factors, original.projector)
    merged = tuned.merge_and_unload()
    model, _ = imported(original, base=original.base)
    for key, value in model.model.language_model.state_dict().items():
        if key != "embed_tokens.weight":
            torch.testing.assert_close(value, merged.state_dict()[key], atol=1e-3, rtol=1e-3)
    assert model.dtype == torch.float16


def test_a_projector_alone_over_its_base_model(original: Original) -> None:
    original.write_tower()
    original.write_base()
    original.write_config(original.checkpoint)
    write_file(original.checkpoint / "mm_projector.bin", original.projector)
    model, _ = imported(original, base=original.base)
    assert_same(model, original.model)


def test_what_was_trained_beside_adapters_takes_the_bases_place(original: Original) -> None:
    """LLaVA trains the words too where an image stands between two of its own."""
    words = {"model.embed_tokens.weight": original.text["model.embed_tokens.weight"]}
    factors, _ = lora(original, "peft")
    factors = {key: torch.zeros_like(value) for key, value in factors.items()}
    original.text = {**original.text, "model.embed_tokens.weight": torch.zeros(VOCAB, 32)}
    original.write_adapters(factors, {**original.projector, **words})
    model, _ = imported(original, base=original.base)
    assert_same(model, original.model)


@pytest.mark.parametrize(("given", "dtype"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_dtype(original: Original, given: str, dtype: torch.dtype) -> None:
    original.config["torch_dtype"] = "bfloat16"
    original.write()
    _, done = imported(original, dtype=given)
    model = AutoModelForImageTextToText.from_pretrained(done.directory)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_the_output_appears_whole_or_not_at_all(original: Original) -> None:
    original.write()
    output = original.checkpoint.parent / "deep" / "made"
    output.mkdir(parents=True)  # an empty directory may be there
    hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=output)
    assert stat.S_IMODE(output.stat().st_mode) & 0o055
    assert [path.name for path in output.parent.iterdir()] == ["made"]
    before = sorted(output.iterdir())
    with pytest.raises(hidrop.HidropError, match="is not empty"):
        hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=output)
    assert sorted(output.iterdir()) == before

    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    other = output.parent / "other"
    with pytest.raises(KeyboardInterrupt, match=r"reading model\.safetensors"):
        hidrop.import_llava(
            original.checkpoint, vision_tower=original.tower, output=other, progress=stop
        )
    assert [path.name for path in output.parent.iterdir()] == ["made"]


def test_one_file_of_weights_is_in_memory_at_a_time(
    original: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hidrop_fx.checkpoints import output as writing

    sizes = []

    def save(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append(sum(value.numel() * value.element_size() for value in weights.values()))
        real(weights, *args, **kwargs)

    real = writing.save_file
    monkeypatch.setattr(writing, "save_file", save)
    original.write(form="sharded bin")
    imported(original, max_shard_size=20000)
    assert len(sizes) > 5
    assert max(sizes) <= 20000


def test_what_the_loader_reads_and_never_uses_is_left_out(original: Original) -> None:
    """The row between tiles, where there are no tiles; a head that the config ties."""
    newline = {"model.image_newline": torch.ones(32)}
    original.write({**original.text, **original.projector, **newline})
    model, done = imported(original)
    assert_same(model, original.model)
    assert any(note.startswith("model.image_newline is left out") for note in done.notes)
