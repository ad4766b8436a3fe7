"""What `test_engines` runs in each of two processes: accelerate's FSDP2, Trainer, TRL; what they save; other meshes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.distributed import agreement
from hidrop_fx.lowering import checkpointing
from tests.distributed.cases import LEARNING, SCHEDULE, compared
from tests.support.models import IMAGE, PAD, VOCAB
from tests.support.sharded import (
    ROWS,
    WORDS,
    apart,
    full_gradients,
    full_parameters,
    inputs_of,
    mean_of_ranks,
    mesh,
    model_of,
    shard,
    train,
)
from tests.support.sharding_accelerate import plugin_on_cpu

LAYERS = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
STEPS = 3


def compiled(schedule: str | None, model: Any = None, **options: Any) -> Any:
    model = model_of() if model is None else model
    model = model.train()
    return (
        model if schedule is None else hidrop.compile(model, schedule, backend="eager", **options)
    )


def frozen(model: Any) -> Any:
    """As in LLaVA's recipe: the tower is not trained. Its last layer has no gradients, without which no optimizer is resumed."""
    model.model.vision_tower.requires_grad_(False)
    return model


def alone(
    rank: int, rows: Any, schedule: str, padding: str = "right", decay: float = 0.01
) -> dict[str, Any] | None:
    """One process with the rows of both, on the first rank alone."""
    return None if rank else expected_of(compiled(schedule), rows, padding, decay)


def expected_of(
    model: Any, rows: Any, padding: str = "right", decay: float = 0.0
) -> dict[str, Any]:
    """One process, without weight decay, as Trainer steps biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=decay)
    return train(model, [inputs_of(model, each, padding) for each in rows], optimizer=optimizer)


def distances(found: dict[str, Any], expected: dict[str, Any] | None) -> dict[str, Any]:
    """How far losses, first gradients and last parameters are from one process's."""
    losses = mean_of_ranks(found["losses"]) if "losses" in found else []
    wanted = losses if expected is None else expected["losses"]
    parts = {}
    for name in ("gradients", "parameters"):
        parts[name] = apart(found[name], None if expected is None else expected[name])
    return {
        **parts,
        "losses": max(
            (abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=False)), default=0.0
        ),
        "count": len(found["gradients"]),
    }


@contextmanager
def shared_folder(rank: int, name: str) -> Iterator[Path]:
    """A directory of both processes, gone afterwards."""
    folder = Path(tempfile.gettempdir()) / f"hidrop_{name}_{os.getppid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
        distributed.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


# accelerate.


def accelerated(mixed_precision: str = "no", **options: Any) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=LAYERS,
        **options,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed_precision)


def prepared(accelerator: Accelerator, model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def accelerate(rank: int) -> Any:
    """With learned ratios, right padding, and a rank without images."""
    expected = alone(rank, WORDS, LEARNING)
    with plugin_on_cpu(rank):
        model, optimizer = prepared(accelerated(), compiled(LEARNING))
        found = train(model, [inputs_of(model, WORDS[rank], "right")], optimizer=optimizer)
    return distances(found, expected)


def accelerate_checkpointing(rank: int) -> Any:
    """Its plug-in wraps the layers, and one body a layer is recomputed; the reference recomputes nothing."""
    expected = alone(rank, ROWS, SCHEDULE)
    recomputed: list[Any] = []
    kept = checkpointing.checkpoint

    def counted(run: Any, *args: Any, **kwargs: Any) -> Any:
        recomputed.append(run)
        return kept(run, *args, **kwargs)

    with plugin_on_cpu(rank):
        accelerator = accelerated(activation_checkpointing=True)
        model, optimizer = prepared(accelerator, compiled(SCHEDULE))
        checkpointing.checkpoint = counted
        try:
            found = train(model, [inputs_of(model, ROWS[rank], "right")], optimizer=optimizer)
        finally:
            checkpointing.checkpoint = kept
        layer = type(model.get_decoder().layers[0]).__mro__
    return {
        **distances(found, expected),
        "wrapped": [kind.__name__ for kind in layer][:3],
        "recomputed": len(recomputed) / STEPS / len(model.get_decoder().layers),
    }


def accelerate_loading(rank: int) -> Any:
    """The first process alone has the weights, the other's are no numbers until the model is sharded; ratios are in no file."""
    expected = alone(rank, ROWS, LEARNING)
    with shared_folder(rank, "loading") as folder, plugin_on_cpu(rank):
        if rank == 0:
            model_of().save_pretrained(folder)
        distributed.barrier()
        accelerator = accelerated(cpu_ram_efficient_loading=True)
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for parameter in model.parameters() if rank else ():
            parameter.data.fill_(torch.nan)
        model, optimizer = prepared(accelerator, compiled(LEARNING, model))
        found = train(model, [inputs_of(model, ROWS[rank], "right")], optimizer=optimizer)
    return distances(found, expected)


def accelerate_bf16(rank: int) -> Any:
    """Under the identity schedule, plain transformers' own numbers, bit by bit: accelerate casts what each unit returns."""
    results = []
    rows = [[[5, IMAGE, 6, 7, 8]], [[13, IMAGE, 14, 15, 16]]][rank]
    for schedule in (None, "inject=0"):
        with plugin_on_cpu(rank):
            model, optimizer = prepared(accelerated("bf16"), compiled(schedule))
            results.append(train(model, [inputs_of(model, rows)], 1, optimizer))
    expected, found = results
    return {
        "losses": abs(found["losses"][0] - expected["losses"][0]),
        "gradients": apart(found["gradients"], expected["gradients"]),
        "dtype": str(next(iter(model.parameters())).dtype),
    }


def bf16_ratios(rank: int) -> Any:
    """Learned ratios in the group of the whole model, and units that return bf16: the numbers of ratios in a unit of their own."""
    results = []
    for output, own in ((None, True), (torch.bfloat16, False)):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output)
        model = compiled(LEARNING)
        if own:
            torch.distributed.fsdp.fully_shard(model.hidrop_ratios, mesh=mesh())
        found = train(shard(model, mp_policy=policy), [inputs_of(model, ROWS[rank])], 1)
        results.append(found)
    expected, found = results
    inside = {k: v for k, v in found["gradients"].items() if "layers" in k or "ratios" in k}
    return {
        "gradients": apart(inside, {k: expected["gradients"][k] for k in inside}),
        "count": len(inside),
        "dtype": str(found["parameters"]["hidrop_ratios.values"].dtype),
    }


# Trainer.


def arguments(folder: Path, cls: Any = transformers.TrainingArguments, **changes: Any) -> Any:
    config = {"transformer_layer_cls_to_wrap": LAYERS, **changes.pop("fsdp_config", {})}
    given = {
        **{"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True},
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_grad_norm": 0.0},
        **{"lr_scheduler_type": "constant", "weight_decay": 0.0, "logging_steps": 1},
        **{"remove_unused_columns": False, "train_sampling_strategy": "sequential"},
        **{"save_strategy": "no", "max_steps": STEPS, "fsdp": True, "fsdp_config": config},
    }
    return cls(**{**given, **changes})


class Gradients(transformers.TrainerCallback):
    """The full gradients of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.first = full_gradients(kwargs["model"])


def trainer(folder: Path, model: Any, rows: Any, **changes: Any) -> tuple[Any, Gradients]:
    """Trainer on rows of both ranks, of which the sampler gives each its own."""
    own = [row for of_rank in rows for row in of_rank]
    noted = Gradients()
    made = transformers.Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=[{"row": k} for k in range(len(own))] * STEPS,  # type: ignore[arg-type]
        data_collator=lambda some: inputs_of(model, [own[each["row"]] for each in some], "right"),
        callbacks=[hidrop.TrainerCallback(), noted],
    )
    return made, noted


def outcome(made: Any, noted: Gradients) -> dict[str, Any]:
    return {"gradients": noted.first, "parameters": full_parameters(made.model)}


def trainer_saving(rank: int) -> Any:
    """Three steps of `Trainer(fsdp=True)`, saved behind the second; what was saved goes on sharded, and in one process.

    Learned ratios, right padding, a rank without images.
    """
    expected = None if rank else expected_of(compiled(LEARNING, frozen(model_of())), WORDS)
    with shared_folder(rank, "trainer") as folder, plugin_on_cpu(rank):
        model = compiled(LEARNING, frozen(model_of()))
        made, noted = trainer(folder, model, WORDS, save_strategy="steps", save_steps=2)
        made.train()
        found = outcome(made, noted)
        made.save_model(str(folder / "last"))
        distributed.barrier()
        files = sorted(path.name for path in (folder / "last").iterdir())
        answers = model.eval().generate(
            **inputs_of(model, WORDS[rank], labels=False), max_new_tokens=3, do_sample=False
        )
        again = _resumed(rank, folder, WORDS)
        wanted = again if expected is None else expected["parameters"]
        one = _gone_on_in_one_process(rank, folder / "last", answers)
        written = json.loads((folder / "last" / "hidrop.json").read_text())["schedule"]["selection"]
    return {
        **distances(found, expected),
        "resumed": apart(again, wanted),
        "files": files,
        "selection": written,
        **one,
    }


def _resumed(rank: int, folder: Path, rows: Any, **changes: Any) -> dict[str, Any]:
    """The parameters behind the third step of a new model that goes on from the second."""
    model = compiled(LEARNING, frozen(model_of(seed=9)))
    made, _ = trainer(folder, model, rows, **changes)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return full_parameters(made.model)


def _gone_on_in_one_process(rank: int, folder: Path, answers: Any) -> dict[str, Any]:
    """What was saved, in plain transformers, under its schedule again, and one step further."""
    if rank:
        return {"answers": True, "stepped": True}
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    hidrop.load(plain, folder, backend="eager")
    inputs = inputs_of(plain, WORDS[rank], labels=False)
    found = plain.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
    before = full_parameters(plain)
    train(plain.train(), [inputs_of(plain, WORDS[rank])], 1)
    moved = [not torch.equal(p, before[n]) for n, p in plain.named_parameters()]
    return {"answers": torch.equal(found, answers), "stepped": sum(moved) > len(moved) / 2}


def trainer_checkpointing(rank: int) -> Any:
    """transformers' own recomputation, which its trainer switches on; by accelerate's plug-in in a second run."""
    expected = None if rank else expected_of(compiled(SCHEDULE, frozen(model_of())), ROWS)
    found = {}
    for name, changes in (
        ("own", {"gradient_checkpointing": True}),
        ("plugin", {"fsdp_config": {"activation_checkpointing": True}}),
    ):
        with shared_folder(rank, name) as folder, plugin_on_cpu(rank):
            made, noted = trainer(folder, compiled(SCHEDULE, frozen(model_of())), ROWS, **changes)  # type: ignore[arg-type]
            made.train()
            found[name] = distances(outcome(made, noted), expected)
    return {key: max(each[key] for each in found.values()) for key in ("gradients", "parameters")}


def trainer_sharded_files(rank: int) -> Any:
    """SHARDED_STATE_DICT: each process writes its part, ratios and schedule once; resumed in a new model."""
    expected = None if rank else expected_of(compiled(LEARNING, frozen(model_of())), ROWS)
    config = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    with shared_folder(rank, "sharded") as folder, plugin_on_cpu(rank):
        model = compiled(LEARNING, frozen(model_of()))
        made, noted = trainer(folder, model, ROWS, save_strategy="steps", save_steps=2, **config)
        made.train()
        found = outcome(made, noted)
        parts = [p.name for p in (folder / "checkpoint-2" / "pytorch_model_fsdp_0").iterdir()]
        again = _resumed(rank, folder, ROWS, **config)
    wanted = again if expected is None else expected["parameters"]
    return {**distances(found, expected), "resumed": apart(again, wanted), "parts": len(parts)}


def trainer_alone_saving(rank: int) -> Any:
    """Trainer without the callback saves in one process, where the ratios are not at hand: an error, no waiting."""
    agreement.WAIT_SECONDS = 2.0
    with shared_folder(rank, "bare") as folder, plugin_on_cpu(rank):
        made, _ = trainer(folder, compiled(LEARNING), ROWS)
        made.remove_callback(hidrop.TrainerCallback)
        made.train()
        try:
            made.save_model(str(folder / "last"))
            message = ""
        except hidrop.HidropError as error:
            message = str(error)
        distributed.barrier()
    agreement.WAIT_SECONDS = 45.0
    return {"message": message}


def headless(model: Any) -> Any:
    """Neither tower nor head is trained."""
    model.lm_head.requires_grad_(False)
    return frozen(model)


def trl(rank: int) -> Any:
    """TRL's SFTTrainer, whose own head computes the loss, against one process's model in a plain loop.

    The head is frozen: TRL 1.16 reads its weight by `full_tensor()`, past its module, so that each process's part has
    the gradient of that process's rows alone, in plain transformers too.
    """
    import datasets
    import tokenizers
    from trl import SFTConfig, SFTTrainer

    expected = None if rank else expected_of(compiled(SCHEDULE, headless(model_of())), ROWS)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
        pad_token=f"w{PAD}",
        eos_token="w2",
        unk_token="w3",
    )
    own = [row for of_rank in ROWS for row in of_rank]
    noted = Gradients()
    with shared_folder(rank, "trl") as folder, plugin_on_cpu(rank):
        model = compiled(SCHEDULE, headless(model_of()))
        made = SFTTrainer(
            model=model,
            args=arguments(
                folder,
                SFTConfig,
                loss_type="nll",
                max_length=None,
                bf16=False,
                gradient_checkpointing=True,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=datasets.Dataset.from_list(
                [{"row": k, "input_ids": [1], "labels": [1]} for k in range(len(own))] * STEPS
            ),
            data_collator=lambda some: inputs_of(model, [own[e["row"]] for e in some], "right"),
            processing_class=tokenizer,
            callbacks=[hidrop.TrainerCallback(), noted],
        )
        made.train()
        found = outcome(made, noted)
    return distances(found, expected)


# By hand, other meshes and places.


def hybrid(rank: int) -> Any:
    """A mesh of two replicas of one part each: gradients are averaged over both axes."""
    mesh = distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return compared(rank, rows=WORDS, schedule=LEARNING, mesh=mesh)


def offloaded(rank: int) -> Any:
    """Parameters on the host between calls; on a CPU the policy is carried, and no copy is needed."""
    return compared(
        rank, schedule=LEARNING, offload_policy=CPUOffloadPolicy(pin_memory=False), answers=True
    )


def changed(rank: int) -> Any:
    """Both ranks change the schedule: compared once a change. Then one alone does, and is told so."""
    noted: list[str] = []
    kept = agreement._put_down

    def put_down(mesh: Any, text: str, wait: Any) -> Any:
        noted.append(text)
        return kept(mesh, text, wait)

    agreement._put_down = put_down
    model = shard(
        hidrop.compile(model_of(), {"a": SCHEDULE, "b": "inject=1,exit=2"}, backend="eager")
    )
    own = inputs_of(model, ROWS[rank], labels=False)
    counts = []
    with torch.no_grad():
        for name in ("a", "a", "b", "b", "a"):
            with hidrop.use(model, name):
                model(**own)
            counts.append(len(noted))
        with hidrop.use(model, "b"):
            model.generate(**own, max_new_tokens=3)
    counts.append(len(noted))
    with hidrop.use(model, ("a", "inject=1,exit=3")[rank]):
        try:
            model(**own)
            message = ""
        except hidrop.HidropError as error:
            message = str(error)
    agreement._put_down = kept
    return {"counts": counts, "message": message}


def one_changes(rank: int) -> Any:
    """The first rank changes its schedule, the other goes on; its process is ended by the first's end."""
    agreement.WAIT_SECONDS = 4.0
    model = shard(
        hidrop.compile(model_of(), {"a": SCHEDULE, "b": "inject=1,exit=2"}, backend="eager")
    )
    own = inputs_of(model, ROWS[rank])
    model(**own)
    with hidrop.use(model, "a" if rank else "b"):
        return float(model(**own).loss)
