"""LLaVA's two training stages under a schedule, with transformers' own Trainer.

    python examples/train_llava.py                                  # the shipped model, drawn pictures
    python examples/train_llava.py --stage 1 --model MODEL --data blip_laion_cc_sbu_558k.json \\
        --images pretrain/ --schedule hidrop-64 --output stage1
    python examples/train_llava.py --stage 2 --model stage1 --data llava_v1_5_mix665k.json \\
        --images finetune/ --schedule hidrop-64 --output stage2 [--lora]

On several GPUs, one process each: DDP with the first command, the model sharded with the others.

    torchrun --nproc-per-node 8 examples/train_llava.py
    torchrun --nproc-per-node 8 examples/train_llava.py --fsdp
    accelerate launch --config_file examples/fsdp2.yaml examples/train_llava.py
    torchrun --nproc-per-node 8 examples/train_llava.py --deepspeed examples/zero3.json

Stage 1 trains the projector alone, on captions; stage 2 projector and language model, or LoRA on it.
Defaults are those of LLaVA-1.5, which HiDrop trains with. `--schedule none` is plain Hugging Face.

`--dual 0.9` trains 90 % of the steps under the schedule and the others with all vision tokens, which `--distill` lets one
of them teach the other.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from llava_data import LAYOUTS, Collator, Conversations, write_demo_data
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE

RATES = {"projector": 1e-3, "full": 2e-5, "lora": 2e-4}
LORA_PROJECTOR_RATE = 2e-5
BATCHES = {1: 256, 2: 128}
# The demo has 300 rows, and a model so small that rates for billions of weights do nothing.
DEMO_BATCH, DEMO_RATE = 16, 3e-4

DISTILL = ("full_from_fast", "fast_from_full", "none")

logger = logging.getLogger("train_llava")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    set_seed(options.seed)
    if options.data == "demo":
        with tempfile.TemporaryDirectory() as folder:
            options.data, options.images = write_demo_data(folder, options.demo_samples)
            train(options)
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    """Train, and save model and processor."""
    processor = AutoProcessor.from_pretrained(options.model)
    arguments = training_arguments(options)  # first: ZeRO-3 then has each process read its part
    model = prepared(LlavaForConditionalGeneration.from_pretrained(options.model), options)
    data = Conversations(
        options.data,
        options.images,
        processor,
        layout=options.layout,
        max_length=options.max_length,
    )
    trainer = GroupedTrainer(
        options,
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(processor, pad_square=options.pad_square),
        callbacks=callbacks(model, options),
    )
    logger.info("%d rows, %s", len(data), _sizes(list(parameter_groups(model, options))))
    trainer.train(resume_from_checkpoint=_checkpoint(options))
    trainer.save_model(options.output)
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output)
    logger.info("saved in %s", options.output)
    if hidrop.is_compiled(model):
        logger.info("%s", hidrop.inspect(model))
        logger.info("hidrop_fx.load(model, %r) compiles the model again", options.output)


def callbacks(model: Any, options: argparse.Namespace) -> list[TrainerCallback]:
    """Return what Trainer calls beside the steps."""
    if not hidrop.is_compiled(model):
        return []
    if options.dual is None:
        return [hidrop.TrainerCallback()]
    distill = None if options.distill == "none" else options.distill
    dual = hidrop.DualTraining(share=options.dual, distill=distill, seed=options.seed)
    return [hidrop.TrainerCallback(), dual]


class GroupedTrainer(Trainer):
    """Trainer whose parameters have rates of their own, in an optimizer that it makes itself, as engines that shard ask for."""

    def __init__(self, options: argparse.Namespace, **given: Any) -> None:
        self.options = options
        super().__init__(**given)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = list(parameter_groups(self.model if model is None else model, self.options))
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer


def prepared(model: Any, options: argparse.Namespace) -> Any:
    """Return the model, the parameters of the stage unfrozen, compiled under the schedule."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if options.lora:
        model = _with_lora(model)
    elif options.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if options.dual is not None:
        both = {"fast": options.schedule, "full": hidrop.Schedule()}
        hidrop.compile(model, both, backend=options.backend)
    elif options.schedule != "none":
        hidrop.compile(model, options.schedule, backend=options.backend)
    return model


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=128,
        lora_alpha=256,
        lora_dropout=0.05,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, config)


def parameter_groups(model: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Group the trained parameters by rate: LoRA's projector and learned ratios have rates of their own."""
    rate = options.learning_rate
    rates = {"projector": LORA_PROJECTOR_RATE if options.lora else rate, "ratios": options.ratio_lr}
    groups: dict[str, list[Any]] = {"model": [], "projector": [], "ratios": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projector = "multi_modal_projector" in name
            kind = "ratios" if "hidrop_ratios" in name else "projector" if projector else "model"
            groups[kind].append(parameter)
    for kind, parameters in groups.items():
        if parameters:
            yield {"params": parameters, "lr": rates.get(kind, rate), "name": kind}


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Return the recipe as TrainingArguments; a step is `--batch` rows, over all devices and micro-batches."""
    at_once = options.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // at_once,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        bf16=bf16,
        tf32=bf16 or None,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=options.log_every,
        save_steps=options.save_every,
        save_total_limit=2,
        seed=options.seed,
        report_to="none",
        # Or the processes of torchrun do not meet there.
        use_cpu=not (torch.accelerator.is_available() or options.deepspeed),
        fsdp=options.fsdp or None,
        fsdp_config=_sharding(options) if options.fsdp else None,
        deepspeed=options.deepspeed,
    )


def _sharding(options: argparse.Namespace) -> dict[str, Any]:
    """Return settings of FSDP2: each layer of decoder and tower is a unit. A LLaVA's own list names a class that it lacks."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(options.model))
    parts = (model.get_decoder(), model.model.vision_tower)
    lists = (m for part in parts for m in part.modules() if isinstance(m, torch.nn.ModuleList))
    names = sorted({type(layer).__name__ for layers in lists for layer in layers})
    return {"version": 2, "transformer_layer_cls_to_wrap": names}


def _checkpoint(options: argparse.Namespace) -> bool:
    found = any(Path(options.output).glob("checkpoint-*"))
    if options.resume and not found:
        logger.info("no checkpoint in %s; starting from the beginning", options.output)
    return bool(options.resume and found)


def _sizes(groups: Sequence[dict[str, Any]]) -> str:
    # A parameter that ZeRO-3 partitions is empty here, and knows its size.
    counts = [[getattr(p, "ds_numel", p.numel()) for p in one["params"]] for one in groups]
    sizes = [(one["name"], sum(n), one["lr"]) for one, n in zip(groups, counts, strict=True)]
    return ", ".join(f"{name}: {count:,} parameters at {rate:g}" for name, count, rate in sizes)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), default=2)
    add("--model", default=str(MODEL_DIR), help="name or directory (the shipped demo model)")
    add("--data", default="demo", help="LLaVA-format JSON, or demo: drawn pictures")
    add("--images", type=Path, default=Path("."), help="folder that image names are relative to")
    add("--output", default="trained")
    add("--schedule", help="as for hidrop.compile; none: plain Hugging Face (hidrop-64)")
    add("--backend", default="inductor")
    add("--dual", type=float, metavar="SHARE", help="of the steps under the schedule; others: all")
    add("--distill", choices=DISTILL, help="with --dual: which teaches which (full_from_fast)")
    add("--lora", action="store_true", help="stage 2 with LoRA, r 128, alpha 256")
    add("--layout", choices=LAYOUTS, help="stage 1: caption; stage 2 and demo: chat")
    add("--learning-rate", type=float, help="stage 1: 1e-3; stage 2: 2e-5, LoRA 2e-4")
    add("--ratio-lr", type=float, default=1e-3, help="of the ratios that selection=dtopk learns")
    add("--batch", type=int, help="rows a step; stage 1: 256, stage 2: 128")
    add("--micro-batch", type=int, default=16, help="rows of it that a device sees at once")
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=int, default=-1)
    add("--max-length", type=int, default=2048, help="tokens a row, vision tokens included")
    add("--pad-square", action=argparse.BooleanOptionalAction, help="stage 2: yes")
    add(
        "--fsdp", action="store_true", help="shard the model over the processes of torchrun (FSDP2)"
    )
    add(
        "--deepspeed",
        metavar="FILE",
        help="train by ZeRO: examples/zero2.json, examples/zero3.json",
    )
    add("--gradient-checkpointing", action="store_true")
    add("--group-by-length", action="store_true")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--save-every", type=int, default=500)
    add("--log-every", type=int, default=1)
    add("--workers", type=int, default=0, help="processes that open images")
    add("--demo-samples", type=int, default=300)
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return _with_defaults(options, parser)


def _with_defaults(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> argparse.Namespace:
    if options.lora and options.stage == 1:
        parser.error("--lora belongs to stage 2; stage 1 trains the projector alone")
    if options.dual is None and options.distill is not None:
        parser.error("--distill belongs to --dual, such as --dual 0.9")
    if options.dual is not None and options.schedule == "none":
        parser.error("--dual needs a schedule for its fast steps, such as --schedule hidrop-64")
    demo = options.data == "demo"
    trained = "projector" if options.stage == 1 else "lora" if options.lora else "full"
    layout = "caption" if options.stage == 1 and not demo else "chat"
    defaults = {
        "schedule": str(SCHEDULE_FILE) if options.model == str(MODEL_DIR) else "hidrop-64",
        "layout": layout,
        "learning_rate": DEMO_RATE if demo else RATES[trained],
        "batch": DEMO_BATCH if demo else BATCHES[options.stage],
        "pad_square": options.stage == 2,
        "distill": DISTILL[0],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options.micro_batch = min(options.micro_batch, max(1, options.batch // world))
    if options.batch % (options.micro_batch * world):
        parser.error(
            f"--batch {options.batch} is no multiple of --micro-batch {options.micro_batch} on {world} devices: a step would have "
            "other rows than that"
        )
    return options


if __name__ == "__main__":
    main()
