"""The tokenizer of a checkpoint with an image token and a padding token, and rows for them, as llava-1.5-7b-hf has them.

    rows = ceil((vocab_size + 2) / 64) * 64                # 32000 -> 32064: <image> is 32000, <pad> 32001
    new  = mean + sqrt(1e-5 / n) * (rows - mean).T @ noise # normal, with 1e-5 of the embedding's covariance

The second line is a draw from what transformers' conversion script draws from, without its Cholesky factor, which exists only
where there are more rows than columns.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer

from hidrop_fx.checkpoints.original_config import CONFIG, OriginalConfig
from hidrop_fx.errors import HidropError

IMAGE, PAD = "<image>", "<pad>"
MULTIPLE = 64
_VARIANCE = 1e-5
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these makes a directory that of a tokenizer."""
_OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_CHUNK = 4096


def read_tokenizer(directories: Sequence[Path], config: OriginalConfig) -> Any:
    """Read the tokenizer of the first directory that has one, and add what the model needs.

    These are the tokens that LLaVA's loader adds, `IMAGE`, and `PAD` unless a Qwen tokenizer has a padding token. Rows are
    padded on the left, as for generation.

    Raises:
        HidropError: no directory has a tokenizer, or it cannot be read, or it has more tokens than the model.
    """
    found = next((path for path in directories if any((path / f).is_file() for f in _FILES)), None)
    if found is None:
        raise HidropError(
            f"no tokenizer in {' or '.join(map(str, directories))}: none of {', '.join(_FILES)}; copy that of the text model "
            "there, or pass its directory as base=..."
        )
    tokenizer = _load(found, config)
    rows, size = config.vocab_size, len(tokenizer)
    if size > rows:
        raise HidropError(
            f"the tokenizer in {found} has {size} tokens, and {config.path} vocab_size={rows}: it is another model's"
        )
    tokenizer.add_tokens(list(config.new_tokens), special_tokens=True)
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    if config.text_type != "qwen2" or tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.chat_template = None
    return tokenizer


def padded_rows(vocab_size: int, tokenizer: Any) -> int:
    """Return how many rows the embedding gets."""
    rows = max(vocab_size + 2, len(tokenizer))
    return -(-rows // MULTIPLE) * MULTIPLE


def new_rows(embedding: Tensor, count: int) -> Tensor:
    """Draw rows for an embedding [n, d] from the normal distribution of its own: fp32 [count, d], the same each time."""
    n, width = embedding.shape
    generator = torch.Generator("cpu").manual_seed(0)
    chunks = embedding.split(_CHUNK)
    mean = (
        sum(
            (chunk.double().sum(dim=0) for chunk in chunks),
            torch.zeros(width, dtype=torch.float64, device="cpu"),
        )
        / n
    )
    drawn = mean.float().repeat(count, 1)
    for chunk in chunks:
        noise = torch.randn(
            count, len(chunk), generator=generator, dtype=torch.float32, device="cpu"
        )
        drawn += (_VARIANCE / n) ** 0.5 * noise @ (chunk.float() - mean.float())
    return drawn


def with_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return a weight [n, d] with more rows, in its dtype."""
    return torch.cat([weight, rows.to(weight.dtype)])


def _load(directory: Path, config: OriginalConfig) -> Any:
    """Load a tokenizer beside the config of the text model: that of the checkpoint is of a class which transformers lacks."""
    with tempfile.TemporaryDirectory() as beside:
        for name in (*_FILES, *_OTHERS):
            if (directory / name).is_file():
                shutil.copy(directory / name, beside)
        config.text_config().to_json_file(Path(beside) / CONFIG, use_diff=False)
        try:
            return AutoTokenizer.from_pretrained(beside, padding_side="left")
        except (ImportError, ValueError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise HidropError(
                f"the tokenizer in {directory} cannot be read: {reason[:300]} (a tokenizer.model needs "
                "`pip install sentencepiece protobuf`)"
            ) from error
