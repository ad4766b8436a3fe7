"""Checkpoints as LLaVA's own code writes them, of tiny random Hugging Face models.

    original = Original(tmp_path, tiny_llava())
    original.config["layer_list"] = "[1,2]"
    original.write()                       # original.checkpoint, original.tower: two directories
    hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=tmp_path / "made")

Keys and configs are written out by hand, from haotian-liu/LLaVA and what its checkpoints on the Hub hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from hidrop_fx.checkpoints import ImportedModel, import_llava
from tests.support.models import VOCAB

WORDS = [
    *("<unk>", "<s>", "</s>", "A", "USER", "ASSISTANT", ":", ".", ",", "?", "[", "]", "INST"),
    *("What", "is", "this", "cat", "red", "chat", "between"),
]
Weights = dict[str, Tensor]


class Original:
    """A model in the original format, and its vision tower."""

    def __init__(self, folder: Path, model: LlavaForConditionalGeneration) -> None:
        self.checkpoint, self.tower, self.base = folder / "llava", folder / "clip", folder / "base"
        self.model = model
        config = model.config
        text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
        kind = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
        rope = text.pop("rope_parameters")
        self.config: dict[str, Any] = {
            **{k: v for k, v in text.items() if k not in ("architectures", "dtype", "layer_types")},
            "model_type": kind[config.text_config.model_type],
            "architectures": ["LlavaLlamaForCausalLM"],
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
            "torch_dtype": "float32",
            "transformers_version": "4.31.0",
            "mm_vision_tower": f"openai/clip-vit-tiny-patch{vision['patch_size']}-{vision['image_size']}",
            "mm_hidden_size": vision["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 2048,
        }
        # CLIP as a whole, as OpenAI's on the Hub.
        self.tower_config: dict[str, Any] = {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "text_config": {"hidden_size": 64, "model_type": "clip_text_model"},
            "vision_config": {**vision, "model_type": "clip_vision_model"},
        }
        side = vision["image_size"]
        self.images: dict[str, Any] = {
            "feature_extractor_type": "CLIPFeatureExtractor",
            **{"do_resize": True, "size": side, "resample": 3},
            **{"do_center_crop": True, "crop_size": side, "do_normalize": True},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        self.text: Weights = {}
        self.projector: Weights = {}
        self.vision: Weights = {}
        for key, value in model.state_dict().items():
            if key.startswith("model.language_model."):
                self.text["model." + key.removeprefix("model.language_model.")] = value
            elif key == "lm_head.weight":
                self.text[key] = value
            elif key.startswith("model.vision_tower."):
                self.vision["vision_model." + key.removeprefix("model.vision_tower.")] = value
            else:
                _, _, layer, kind_of = key.split(".")
                number = {"linear_1": 0, "linear_2": 2}[layer]
                self.projector[f"model.mm_projector.{number}.{kind_of}"] = value
        self.text["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    def inside(self) -> Weights:
        """The tower's weights as those of the checkpoint."""
        return {f"model.vision_tower.vision_tower.{key}": v for key, v in self.vision.items()}

    def write(self, weights: Weights | None = None, *, form: str = "safetensors") -> None:
        """Write both directories; `form` is that of the checkpoint's weights."""
        self.write_tower()
        self.write_config(self.checkpoint)
        write_tokenizer(self.checkpoint)
        found = {**self.text, **self.projector} if weights is None else weights
        if form in ("safetensors", "bin"):
            write_file(self.checkpoint / FILES[form], found)
        else:
            write_shards(self.checkpoint, found, form.removeprefix("sharded "))

    def write_tower(self) -> None:
        self.tower.mkdir(parents=True, exist_ok=True)
        (self.tower / "config.json").write_text(json.dumps(self.tower_config))
        (self.tower / "preprocessor_config.json").write_text(json.dumps(self.images))
        extra = {
            "vision_model.embeddings.position_ids": torch.arange(3)[None],
            "text_model.final_layer_norm.weight": torch.ones(64),
            "text_projection.weight": torch.ones(4, 64),
            "visual_projection.weight": torch.ones(4, 32),
            "logit_scale": torch.tensor(1.0),
        }
        write_file(self.tower / "pytorch_model.bin", {**self.vision, **extra})

    def write_config(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        ids = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "do_sample": False}
        (directory / "generation_config.json").write_text(json.dumps(ids))

    def write_base(self) -> None:
        """Write the text model alone, with its tokenizer."""
        self.base.mkdir(parents=True, exist_ok=True)
        (self.base / "config.json").write_text(json.dumps({"model_type": "llama"}))
        write_file(self.base / "pytorch_model.bin", self.text)
        write_tokenizer(self.base)

    def write_adapters(self, factors: Weights, trained: Weights, **config: Any) -> None:
        """Write LoRA adapters as LLaVA does, with what was trained beside them, and the base model."""
        self.write_tower()
        self.write_base()
        self.write_config(self.checkpoint)
        plain = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 6,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        plain["base_model_name_or_path"] = "lmsys/vicuna-7b-v1.5"
        path = self.checkpoint / "adapter_config.json"
        path.write_text(json.dumps({**plain, **config}))
        write_file(self.checkpoint / "adapter_model.bin", factors)
        values = {f"base_model.model.{key}": value for key, value in trained.items()}
        write_file(self.checkpoint / "non_lora_trainables.bin", values)


def imported(original: Original, **options: Any) -> tuple[Any, ImportedModel]:
    """Import a checkpoint, and load what was written, all keys of which must be the model's."""
    output = original.checkpoint.parent / "made"
    done = import_llava(
        original.checkpoint, **{"vision_tower": original.tower, "output": output, **options}
    )
    model, loading = LlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval(), done


FILES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def write_file(path: Path, weights: Weights) -> None:
    if path.suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file({key: value.clone() for key, value in weights.items()}, path)


def write_shards(directory: Path, weights: Weights, form: str, count: int = 3) -> None:
    """Write weights in turns into so many files, and their index."""
    stem, suffix = FILES[form].split(".")
    names = [f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}" for k in range(count)]
    places = {key: names[k % count] for k, key in enumerate(weights)}
    for name in names:
        write_file(directory / name, {k: v for k, v in weights.items() if places[k] == name})
    index = {"metadata": {}, "weight_map": places}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of `VOCAB` words."""
    words = [*WORDS, *(f"word{k}" for k in range(VOCAB - len(WORDS)))]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(directory)
