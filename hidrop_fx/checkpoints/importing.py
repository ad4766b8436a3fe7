"""Import a checkpoint of the original LLaVA, with the schedule that it was trained under.

    hidrop.import_llava("llava-v1.5-7b", vision_tower="clip-vit-large-patch14-336", output="llava")
    model = LlavaForConditionalGeneration.from_pretrained("llava")
    hidrop.load(model, "llava")                      # where the checkpoint tells a schedule

No code of the checkpoint's is run, nothing is downloaded, and the model is never in memory: tensors go from file to file, renamed.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from hidrop_fx.checkpoints.adapters import (
    Adapters,
    check_adapters,
    find_adapters,
    find_trainables,
)
from hidrop_fx.checkpoints.chat_templates import NAMES
from hidrop_fx.checkpoints.model_files import write_config, write_processor
from hidrop_fx.checkpoints.original_config import OriginalConfig, read_config, read_json
from hidrop_fx.checkpoints.original_schedule import schedule_of, trained_without
from hidrop_fx.checkpoints.output import Shards, check_output, new_directory, size_in_bytes
from hidrop_fx.checkpoints.routes import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TOWER,
    TWIG,
    check,
    expected_shapes,
    routed,
    without_unused,
)
from hidrop_fx.checkpoints.towers import Tower, find_tower
from hidrop_fx.checkpoints.twig_weights import check_twig, find_twig, write_twig
from hidrop_fx.checkpoints.vocabulary import (
    new_rows,
    padded_rows,
    read_tokenizer,
    with_rows,
)
from hidrop_fx.checkpoints.weight_files import KINDS, Entry, find_weights, opened
from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.models.loading import DTYPES
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.sidecar import DEFAULT, write_sidecar

logger = logging.getLogger("hidrop_fx")

Entries = dict[str, Entry]


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A model that was imported, and what was decided on the way."""

    directory: Path
    schedule: Schedule | None
    """Written as hidrop.json; None if the checkpoint was trained with all vision tokens."""
    parameters: int
    vocab_size: int
    """Rows of the embedding."""
    notes: tuple[str, ...]
    """One sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        return {
            "directory": str(self.directory),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "parameters": self.parameters,
            "vocab_size": self.vocab_size,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"written   {self.directory} ({self.parameters / 1e9:.2f} B parameters)"]
        if self.schedule is not None:
            lines.append(f"schedule  {self.schedule}")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])


def import_llava(
    checkpoint: str | Path,
    *,
    output: str | Path,
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
    twig: str | Path | None = None,
    schedule: Schedule | str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "2GB",
    progress: Callable[[str], object] | None = None,
) -> ImportedModel:
    """Write a checkpoint of the original LLaVA as a directory of `LlavaForConditionalGeneration`, with its processor.

    Args:
        checkpoint: a directory, such as a copy of liuhaotian/llava-v1.5-7b: config.json, and weights, or LoRA adapters with
            `non_lora_trainables.bin`, or `mm_projector.bin`.
        output: a directory that does not exist yet, or is empty; it appears when all is written.
        vision_tower: the directory of the CLIP model that config.json names; None if that is a directory here.
        base: the directory of the text model that adapters or a projector were trained on. Its tokenizer is taken.
        twig: the directory of a side branch that TwigVLM's authors' code has trained.
        schedule: the schedule that the checkpoint was trained under, or its text for `Schedule.parse`; None for the
            one in its config.json.
        dtype: of all weights: "float32", "bfloat16" or "float16"; "auto" takes what config.json says, or else the embedding's.
        max_shard_size: of a file of weights: "2GB", or bytes. One such file is all that is in memory at a time.
        progress: called with a line for each file that is read.

    Raises:
        HidropError: something is missing, is unknown, or has no counterpart; the message names the file and the key, and
            nothing is written.
    """
    checkpoint, output, limit = Path(checkpoint), Path(output), size_in_bytes(max_shard_size)
    check_output(output)
    if dtype not in DTYPES:
        raise HidropError(f"dtype={dtype!r}; use one of {', '.join(DTYPES)}")
    for name, path in (("checkpoint", checkpoint), ("base", base), ("twig", twig)):
        if path is not None and not Path(path).is_dir():
            raise HidropError(f"{name}={str(path)!r} is no directory")
    config = read_config(checkpoint)
    tower = find_tower(config, vision_tower)
    image_tokens = tower.patches + (config.strategy == "full")
    entries, adapters = _sources(checkpoint, None if base is None else Path(base))
    entries, notes = without_unused(entries, tied=bool(config.text_config().tie_word_embeddings))
    branch = {place: entry for place, entry in entries.items() if place.startswith(TWIG)}
    entries = {place: entry for place, entry in entries.items() if place not in branch}
    branch = find_twig(Path(twig)) if twig is not None else branch
    entries, note = _with_tower(entries, tower, config, partial=adapters is not None)
    expected = expected_shapes(config, tower.config)
    check(entries, expected, config)
    if adapters is not None:
        check_adapters(adapters, entries)
    chosen = _schedule(config, schedule, image_tokens, branch=bool(branch))
    twig_layers = check_twig(branch, expected) if branch else 0
    directories = [checkpoint] if base is None else [Path(base), checkpoint]
    tokenizer = read_tokenizer(directories, config)
    rows = padded_rows(config.vocab_size, tokenizer)
    notes += [note, *_decisions(config)]
    with new_directory(output) as directory:
        kind = _dtype(dtype, config, entries[EMBEDDING])
        shards = Shards(directory, limit)
        for place, tensor in _tensors(entries, adapters, config, rows, progress):
            shards.add(place, tensor.to(kind))
        shards.finish()
        write_config(directory, config, tower, tokenizer, rows, kind, image_tokens)
        write_processor(directory, config, tower, tokenizer)
        if chosen is not None:
            write_sidecar(directory, {DEFAULT: (chosen, None)})
            if "twig" in chosen.modules:
                write_twig(directory, branch, twig_layers, chosen)
        AutoProcessor.from_pretrained(directory)  # it raises here, and not at its user's
    for line in notes:
        logger.info("%s: %s", output, line)
    return ImportedModel(
        directory=output,
        schedule=chosen,
        parameters=shards.parameters,
        vocab_size=rows,
        notes=tuple(notes),
    )


def _sources(checkpoint: Path, base: Path | None) -> tuple[Entries, Adapters | None]:
    """Find all weights by their places: those of the checkpoint, or of its base model and what was trained over it.

    Without adapters, where the projector alone was trained, there is an empty set of them.
    """
    adapters, trained = find_adapters(checkpoint), find_trainables(checkpoint)
    whole = any([*checkpoint.glob(f"{stem}*{suffix}")] for stem, suffix in KINDS)
    if adapters is None and (whole or not trained):
        return routed(find_weights(checkpoint)), None
    if base is None:
        raise HidropError(
            f"{checkpoint} holds {'adapters' if adapters else 'a projector'} and no text model: pass the directory of the model that they "
            f"were trained on, base=... ({_base_name(checkpoint)})"
        )
    entries = {**routed(find_weights(base)), **routed(trained)}
    return entries, adapters or Adapters({}, 1.0)


def _base_name(checkpoint: Path) -> str:
    path = checkpoint / "adapter_config.json"
    found = read_json(path, "").get("base_model_name_or_path") if path.is_file() else None
    return f"adapter_config.json names {found!r}" if found else "such as lmsys/vicuna-7b-v1.5"


def _with_tower(
    entries: Entries, tower: Tower, config: OriginalConfig, *, partial: bool
) -> tuple[Entries, str]:
    """Choose the vision tower's weights as LLaVA's loader does, and say which."""
    inside = {place: entry for place, entry in entries.items() if place.startswith(TOWER)}
    others = {place: entry for place, entry in entries.items() if place not in inside}
    own = tower.entries()
    if config.tower_inside:
        trained = {**own, **inside} if partial and inside else inside
        return {**others, **trained}, "the vision tower is that of the checkpoint, which trained it"
    if own:
        return {**others, **own}, f"the vision tower is that of {tower.directory}"
    return entries, f"the vision tower is that of the checkpoint: {tower.directory} has no weights"


def _schedule(
    config: OriginalConfig, given: Schedule | str | None, image_tokens: int, *, branch: bool
) -> Schedule | None:
    """Return the schedule of a checkpoint: the given one, or that of its config.json."""
    layers = config.num_layers
    if isinstance(given, str):
        found: Schedule | None = Schedule.parse(given, layers)
    elif given is not None:
        given.validate(layers)
        found = given
    else:
        found = schedule_of(config, image_tokens)
    if found is None and branch:
        found = Schedule.preset("twigvlm", layers)
    if found is None and config.reduced:
        raise trained_without(config)
    missing = (
        [] if found is None else [name for name in found.modules if name != "twig" or not branch]
    )
    if missing:
        raise ScheduleError(
            f"schedule={found} needs {missing[0]!r} beside the model"
            + (
                ": pass the directory of the trained branch, twig=..."
                if missing[0] == "twig"
                else ""
            )
        )
    return found


def _decisions(config: OriginalConfig) -> Iterator[str]:
    yield f"the chat template writes LLaVA's {NAMES[config.text_type]!r}"
    if config.pads_to_square:
        yield "images are padded to a square, as image_aspect_ratio='pad' says"
    if config.projector == "linear":
        yield "mm_projector_type='linear' became a linear layer, no activation, and an identity"
    unknown = config.unknown_keys()
    if unknown:
        logger.warning(
            "%s: keys that are not known here are not carried over: %s",
            config.path,
            ", ".join(unknown),
        )
        yield f"keys of config.json that are not known here are not carried over: {', '.join(unknown)}"


def _tensors(
    entries: Entries,
    adapters: Adapters | None,
    config: OriginalConfig,
    rows: int,
    progress: Callable[[str], object] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors by their places, file by file."""
    merged = (adapters or Adapters({}, 1.0)).merged
    with opened(entries[EMBEDDING].path) as file:
        embedding = merged(EMBEDDING, file.tensor(entries[EMBEDDING].key))
        added = new_rows(embedding, rows - len(embedding))
        del embedding
    places: dict[Path, list[str]] = {}
    for place, entry in entries.items():
        places.setdefault(entry.path, []).append(place)
    for k, (path, inside) in enumerate(places.items()):
        if progress is not None:
            progress(f"reading {path.name} ({k + 1} of {len(places)})")
        with opened(path) as file:
            for place in inside:
                tensor = merged(place, file.tensor(entries[place].key))
                yield place, with_rows(tensor, added) if place in (EMBEDDING, HEAD) else tensor
    if config.projector == "linear":
        width = entries[f"{PROJECTOR}linear_1.bias"].shape[0]
        yield f"{PROJECTOR}linear_2.weight", torch.eye(width, dtype=torch.float32, device="cpu")
        yield f"{PROJECTOR}linear_2.bias", torch.zeros(width, dtype=torch.float32, device="cpu")


def _dtype(name: str, config: OriginalConfig, embedding: Entry) -> torch.dtype:
    written = config.values.get("torch_dtype", config.values.get("dtype"))
    wanted = str(written).removeprefix("torch.") if name == "auto" else name
    if wanted in DTYPES[1:]:
        found: torch.dtype = getattr(torch, wanted)
        return found
    with opened(embedding.path) as file:
        return file.tensor(embedding.key).dtype
