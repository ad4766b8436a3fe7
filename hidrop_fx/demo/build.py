"""The untrained demo model and its processor, as ordinary Hugging Face objects."""

import re

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitWords
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hidrop_fx.demo import pictures

PATCH = 8
TOWER_WIDTH = 128
PATCHES = pictures.SIZE // PATCH
VISION_TOKENS = PATCHES * PATCHES
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE)
WORD = r"<image>|\w+|[^\w\s]"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def words(text: str) -> list[str]:
    """Split a text as the tokenizer does."""
    return re.findall(WORD, text)


def vocabulary() -> dict[str, int]:
    """Return every token of the model, special ones first, padded to a multiple of eight."""
    texts = [
        pictures.prompt(pictures.DESCRIBE),
        "Which digit shape word colour is at the",
        "How many digits shapes words are there?",
        "empty cell , . Where Is there thing nothing yes no and a of",
        *pictures.ROWS,
        *pictures.COLUMNS,
        *pictures.COLOURS,
        *pictures.VALUES,
    ]
    found = dict.fromkeys(token for text in texts for token in words(text))
    tokens = [*SPECIAL, *(token for token in found if token not in SPECIAL)]
    tokens += [f"<spare{index}>" for index in range(-len(tokens) % 8)]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a closed-vocabulary tokenizer with one token a word."""
    known = vocabulary()
    tokenizer = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = SplitWords(Regex(WORD), "removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, known[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor; its image part needs Pillow only."""
    side = pictures.SIZE
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_config() -> LlavaConfig:
    """Return the config: twelve decoder layers of width 128 over a four-layer tower that sees 144 patches."""
    known = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=pictures.SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(known),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=known[PAD],
        bos_token_id=known[BOS],
        eos_token_id=known[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=known[IMAGE],
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """Build the model with fresh weights; places on the grid are written into the tower's positions."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config())
    _grid_positions(model.model.vision_tower.embeddings.position_embedding.weight)
    _quiet_residuals(model)
    known = vocabulary()
    model.generation_config = GenerationConfig(
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=known[PAD],
        bos_token_id=known[BOS],
        eos_token_id=known[EOS],
    )
    return model


def _grid_positions(weight: torch.nn.Parameter) -> None:
    """Mark each patch's cell row and column, and its row and column within the cell, [145, D]."""
    patch = torch.arange(VISION_TOKENS)
    row, column = patch // PATCHES, patch % PATCHES
    side = PATCHES // pictures.GRID
    marks = torch.cat(
        [
            torch.nn.functional.one_hot(index, count)
            for index, count in (
                (row // side, pictures.GRID),
                (column // side, pictures.GRID),
                (row % side, side),
                (column % side, side),
            )
        ],
        dim=1,
    ).float()
    with torch.no_grad():
        weight[1:, : marks.shape[1]] += marks


def _quiet_residuals(model: LlavaForConditionalGeneration) -> None:
    """Start every decoder layer close to the identity."""
    layers = len(model.model.language_model.layers)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * layers) ** -0.5)
