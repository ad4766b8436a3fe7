"""What `test_zero` runs in each of two processes: one function a case, called with the rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors
import safetensors.torch
import torch
import transformers
from torch import distributed, nn
from transformers import LlavaForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

import hidrop_fx as hidrop
from hidrop_fx.distributed import agreement
from tests.distributed.cases import BY_TEXT, BY_TOWER, LEARNING, SCHEDULE, _checkpoint, _frozen
from tests.distributed.engine_cases import frozen, shared_folder
from tests.support import counter
from tests.support.models import IMAGE, VOCAB
from tests.support.sharded import (
    ROWS,
    WORDS,
    apart,
    inputs_of,
    mean_of_ranks,
    model_of,
    shard,
)
from tests.support.sharded import full_parameters as parameters_alone
from tests.support.sharded import train as train_alone
from tests.support.zero import (
    adamw,
    config_of,
    distances,
    expected_of,
    full_parameters,
    launched,
    started,
    train,
)


def compiled(model: Any, schedule: str | None = SCHEDULE, backend: str = "eager") -> Any:
    return model if schedule is None else hidrop.compile(model, schedule, backend=backend)


def compared(
    rank: int,
    *,
    stage: int = 3,
    rows: Any = ROWS,
    schedule: str | None = SCHEDULE,
    first: str = "compile",
    padding: str = "right",
    backend: str = "eager",
    change: Any = None,
    leaves: bool = False,
    answers: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train on a rank's rows under DeepSpeed, and one process's model on all rows; return how far they are apart.

    Args:
        change: called with each model, in front of everything.
        leaves: each decoder layer is gathered as a whole.
        answers: afterwards, generate for the rank's rows.
    """

    def made() -> Any:
        model = model_of().train()
        if change is not None:
            change(model)
        return model

    expected, alone = None, None
    if rank == 0:  # the other would compute the same
        alone = compiled(made(), schedule, backend)
        expected = expected_of(alone, rows, padding)
    model = made()
    for layer in model.get_decoder().layers if leaves else ():
        layer._z3_leaf = True
    if first == "compile":
        compiled(model, schedule, backend)
    engine = started(model, stage, **options)
    if first == "engine":
        compiled(model, schedule, backend)
    found = train(engine, [inputs_of(model, rows[rank], padding)])
    result = distances(found, expected)
    if answers:
        result |= _answers(model, alone, rows[rank])
    return result


def _answers(model: Any, alone: Any, rows: Any) -> dict[str, Any]:
    own = inputs_of(model, rows, labels=False)
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.eval().generate(**own, **given, synced_gpus=True).tolist()
    wanted = tokens
    if (
        alone is not None
    ):  # transformers would have it wait for the others where a HfDeepSpeedConfig is alive
        wanted = alone.eval().generate(**own, **given, synced_gpus=False).tolist()
    return {"tokens": tokens, "wanted": wanted}


def zero3(rank: int) -> Any:
    """Learned ratios, right padding, the second rank without images; then answers."""
    return compared(rank, schedule=LEARNING, rows=WORDS, answers=True)


def zero2(rank: int) -> Any:
    return compared(rank, stage=2, schedule=LEARNING, rows=WORDS, answers=True)


def engine_first(rank: int) -> Any:
    return compared(rank, first="engine", answers=True)


def zero2_engine_first(rank: int) -> Any:
    return compared(rank, stage=2, first="engine")


def previous_layer(rank: int) -> Any:
    """Scores at layer 2 by layer 1's attention."""
    return compared(rank, schedule="fastv", padding="left")


def reduced_by_tower(rank: int) -> Any:
    """Images of one rank alone are reduced by what the tower computes, and projected twice."""
    return compared(rank, schedule=BY_TOWER, rows=WORDS, answers=True)


def reduced_by_text(rank: int) -> Any:
    """Words of one rank alone are embedded twice."""
    return compared(rank, schedule=BY_TEXT, rows=WORDS)


def leaves(rank: int) -> Any:
    return compared(rank, leaves=True)


def frozen_decoder(rank: int) -> Any:
    """One rank has an answer straight behind an image, whose feature is a text position; the other has not."""
    rows = [[[5, 6, 7, IMAGE, 8, 9], [9, 10, IMAGE, 11]], [[13, IMAGE, 14], [5, 13, 16, IMAGE, 17]]]
    return compared(rank, rows=rows, change=_frozen, schedule="inject=2,prune=2:6,exit=3")


def frozen_without_images(rank: int) -> Any:
    return compared(rank, rows=WORDS, change=_frozen)


def checkpointed(rank: int) -> Any:
    return compared(rank, change=_checkpoint)


def kept(rank: int) -> Any:
    """DeepSpeed's own threshold, by which small parameters stay gathered between the steps."""
    zero = {"stage3_param_persistence_threshold": 1000}
    return compared(rank, schedule=LEARNING, zero_optimization=zero)


def offloaded(rank: int) -> Any:
    """The optimizer's states and the parameters on the host, which is the device too here."""
    there = {"device": "cpu"}
    return compared(rank, zero_optimization={"offload_optimizer": there, "offload_param": there})


def accumulated(rank: int) -> Any:
    """Two batches a rank for each step."""
    found = {}
    for stage in (2, 3):
        expected = None
        if rank == 0:
            expected = expected_of(compiled(model_of().train()), ROWS)
        model = compiled(model_of().train())
        engine = started(model, stage, gradient_accumulation_steps=2)
        batches = [inputs_of(model, rows, "right") for rows in (ROWS[rank], ROWS[1 - rank])]
        found[stage] = distances(train(engine, batches), expected)
    return {key: max(each[key] for each in found.values()) for key in found[2]}


def adapters(rank: int) -> Any:
    """LoRA in the decoder, before and behind `compile`."""
    from peft import LoraConfig, get_peft_model

    def made(first: bool) -> Any:
        torch.manual_seed(3)
        config = LoraConfig(
            target_modules=r".*language_model.*(q_proj|up_proj)", r=4, init_lora_weights=False
        )
        if first:
            return get_peft_model(compiled(model_of()), config).train()
        model = get_peft_model(model_of(), config).train()
        compiled(model.get_base_model())
        return model

    found = {}
    for stage, first in ((3, True), (3, False), (2, True)):
        expected = None
        if rank == 0:
            expected = expected_of(made(first), ROWS)
        model = made(first)
        engine = started(model, stage)
        own = inputs_of(model.get_base_model(), ROWS[rank], "right")
        found[stage, first] = distances(train(engine, [own]), expected)
    return {
        key: max(each[key] for each in found.values())
        for key in ("gradients", "parameters", "losses", "count")
    }


def loaded(rank: int) -> Any:
    """Read by `from_pretrained` in parts, each process its own; then trained, and asked."""
    with shared_folder(rank, "zero_loaded") as folder:
        if rank == 0:
            model_of().save_pretrained(folder)
        distributed.barrier()
        expected, alone = None, None
        if rank == 0:
            alone = compiled(LlavaForConditionalGeneration.from_pretrained(folder).train())
            expected = expected_of(alone, ROWS)
        with launched(rank):
            config = HfDeepSpeedConfig(config_of(3))  # transformers looks for it while it is alive
            model = LlavaForConditionalGeneration.from_pretrained(folder).train()
            empty = [not p.numel() for p in model.parameters()]
            compiled(model)
            try:
                model(**inputs_of(model, ROWS[rank]))
                message = ""
            except hidrop.HidropError as error:
                message = str(error)
            engine = started(model, 3)
            found = distances(train(engine, [inputs_of(model, ROWS[rank], "right")]), expected)
            found |= _answers(model, alone, ROWS[rank])
            found |= {"empty": all(empty), "message": message, "stage": config.is_zero3()}
    return found


def answers(rank: int) -> Any:
    """Rows that end at different times on the ranks, with a cache, beams; `restore` leaves nothing behind."""
    alone = compiled(model_of())
    rows = WORDS[rank]
    own = inputs_of(alone, rows, "left", labels=False)
    length = own["input_ids"].shape[1]
    model = compiled(model_of())
    started(model, 3)
    model.eval()
    found, expected = [], []
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 2 + 3 * rank},
        {"max_length": length + 6 - 4 * rank},
        {"max_new_tokens": 3, "num_beams": 2},
    ]
    with counter.expect(captures=1):
        for given in settings:
            found.append(model.generate(**own, **given, do_sample=False, synced_gpus=True).tolist())
    for given in settings:
        expected.append(alone.generate(**own, **given, do_sample=False).tolist())
    with torch.no_grad():
        apart_by = float((model(**own).logits - alone(**own).logits).abs().max())
    hidrop.restore(model)
    shown = inputs_of(model, ROWS[rank], labels=False)
    with torch.no_grad():
        restored = float((model(**shown).logits - model_of()(**shown).logits).abs().max())
    return {
        "found": found,
        "expected": expected,
        "logits": apart_by,
        "restored": restored,
        "left": [n for m in model.modules() for n in vars(m) if "hidrop" in n or n == "forward"],
    }


def order(rank: int) -> Any:
    """Whether tokens are embedded or an image is encoded first: the same on a rank without images."""
    found = {}
    look_up, convolve = torch.nn.functional.embedding, torch.nn.functional.conv2d
    for engine in ("zero3", "zero2", "fully_shard"):
        model = compiled(model_of().train())
        names: list[str] = []

        def embedding(ids: Any, table: Any, *args: Any, names: list[str] = names, **kw: Any) -> Any:
            names += ["tokens"] if len(table) == VOCAB else []
            return look_up(ids, table, *args, **kw)

        def patches(*args: Any, names: list[str] = names, **kwargs: Any) -> Any:
            names.append("image")
            return convolve(*args, **kwargs)

        called = shard(model) if engine == "fully_shard" else started(model, int(engine[-1]))
        inputs = inputs_of(model, WORDS[rank])
        with (
            patch.object(torch.nn.functional, "embedding", embedding),
            patch.object(nn.Conv2d, "_conv_forward", lambda m, x, w, b: patches(x, w, b, m.stride)),
        ):
            called(**inputs).loss.backward()
        found[engine] = names
    return found


def wrong(rank: int) -> Any:
    """Different schedules, and a rank that is not compiled: told on every rank that is."""
    found = {}
    model = compiled(model_of(), f"inject=1,exit={2 + rank}")
    engine = started(model, 3)
    begun = time.monotonic()
    try:
        engine(**inputs_of(model, ROWS[rank]))
    except hidrop.HidropError as error:
        found["different"] = str(error)
    found["seconds"] = time.monotonic() - begun
    model = model_of()
    engine = started(model, 3)
    try:
        compiled(model, "inject=1,exit=2").forward(**inputs_of(model, ROWS[rank]))
    except hidrop.HidropError as error:
        found["past"] = str(error)
    return found


def one_rank_alone(rank: int) -> Any:
    """The other rank runs plain transformers; its process is ended by the first's end."""
    agreement.WAIT_SECONDS = 5.0
    model = model_of() if rank else compiled(model_of())
    return float(started(model, 3)(**inputs_of(model, ROWS[rank])).loss)


def sixteen(rank: int) -> Any:
    """bf16 weights, and learned ratios whose fp32 values are the optimizer's; against one process in fp32."""
    model = compiled(model_of().train(), LEARNING)
    start = model.hidrop_ratios.now().tolist()
    alone = expected_of(model, ROWS)
    found: dict[str, Any] = {"start": start, "expected": model.hidrop_ratios.now().tolist()}
    for stage in (2, 3):
        model = compiled(model_of().train(), LEARNING)
        engine = started(model, stage, bf16={"enabled": True})
        losses = []
        for _ in range(3):
            loss = engine(**inputs_of(model, ROWS[rank], "right")).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        pairs = zip(mean_of_ranks(losses), alone["losses"], strict=True)
        with shared_folder(rank, f"sixteen{stage}") as folder:
            hidrop.save(model, folder)
            distributed.barrier()
            saved = safetensors.torch.load_file(folder / "hidrop.safetensors")
        found[stage] = {
            "losses": max(abs(a - b) / abs(b) for a, b in pairs),
            "dtype": str(next(model.get_decoder().parameters()).dtype),
            "ratios": model.hidrop_ratios.now().tolist(),
            "saved": [float(value) for value in saved.values()],
        }
    return found


# Compiled.


def aot_eager(rank: int) -> Any:
    return _compiled_once(rank, "aot_eager")


def inductor(rank: int) -> Any:
    return _compiled_once(rank, "inductor")


def _compiled_once(rank: int, backend: str) -> Any:
    """Train, then two more steps on other lengths, which must compile nothing."""
    with counter.expect(fallbacks=0):
        found = compared(rank, backend=backend)
        found2 = compared(rank, stage=2, backend=backend, schedule=LEARNING)
    model = compiled(model_of().train(), backend=backend)
    engine = started(model, 3)
    train(engine, [inputs_of(model, ROWS[rank])], 2)
    longer = [[*row, 20 + rank, 21] for row in ROWS[rank]]
    with counter.expect(captures=0, compiled=0, fallbacks=0):
        train(engine, [inputs_of(model, longer)], 2)
    return {key: max(found[key], found2[key]) for key in found}


# accelerate, Trainer, and what they save.


def accelerated(rank: int) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin

    found = {}
    for stage in (2, 3):
        expected = None
        if rank == 0:
            expected = expected_of(compiled(frozen(model_of().train()), LEARNING), WORDS)
        model = compiled(frozen(model_of().train()), LEARNING)
        with launched(rank):
            plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage))
            accelerator = Accelerator(deepspeed_plugin=plugin)
            engine, optimizer = accelerator.prepare(model, adamw(model))
            noted: dict[str, Any] = {"losses": []}
            for _ in range(3):
                loss = engine(**inputs_of(model, WORDS[rank], "right")).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                noted["losses"].append(float(loss.detach()))
            noted["parameters"] = full_parameters(model)  # accelerate steps in `backward`
            found[stage] = distances(noted, expected)
            accelerator.state._reset_state(reset_partial_state=True)
    return {key: max(each[key] for each in found.values()) for key in found[2]}


def _trainer(folder: Path, stage: int, model: Any, rows: Any, **changes: Any) -> Any:
    """Trainer on rows of both ranks, of which the sampler gives each its own.

    The model is made before the arguments: transformers cannot make a LLaVA of a configuration alone under ZeRO-3.
    """
    config = config_of(stage, train_micro_batch_size_per_gpu="auto")
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    given: dict[str, Any] = {
        **{"output_dir": str(folder), "report_to": [], "disable_tqdm": True, "deepspeed": config},
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_grad_norm": 0.0},
        **{"lr_scheduler_type": "constant", "weight_decay": 0.0, "logging_steps": 1},
        **{"remove_unused_columns": False, "train_sampling_strategy": "sequential"},
        **{"save_strategy": "no", "max_steps": 3, "bf16": False},
        **changes,
    }
    arguments = transformers.TrainingArguments(**given)
    own = [row for of_rank in rows for row in of_rank]
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"row": k} for k in range(len(own))] * 3,  # type: ignore[arg-type]
        data_collator=lambda some: inputs_of(model, [own[each["row"]] for each in some], "right"),
        callbacks=[hidrop.TrainerCallback()],
    )


def trainer3(rank: int) -> Any:
    return _trained(rank, 3)


def trainer2(rank: int) -> Any:
    return _trained(rank, 2)


def _trained(rank: int, stage: int) -> Any:
    """Three steps of `Trainer(deepspeed=...)`, saved behind the second; what was saved goes on under it, and in one process.

    Learned ratios, right padding, a rank without images.
    """
    expected = None
    if rank == 0:
        expected = expected_of(compiled(frozen(model_of().train()), LEARNING), WORDS)
    with shared_folder(rank, f"zero_trainer{stage}") as folder:
        model = compiled(frozen(model_of().train()), LEARNING)
        with launched(rank):
            made = _trainer(folder, stage, model, WORDS, save_strategy="steps", save_steps=2)
            made.train()
            found = {"parameters": full_parameters(made.model)}
            found["losses"] = [e["loss"] for e in made.state.log_history if "loss" in e]
            made.save_model(str(folder / "last"))
            made.model_wrapped.save_16bit_model(str(folder / "bare"), "pytorch_model.bin")
            own = inputs_of(made.model, WORDS[rank], labels=False)
            tokens = made.model.eval().generate(**own, max_new_tokens=3, do_sample=False)
        distributed.barrier()
        again = _resumed(rank, stage, folder)
        result = distances(found, expected)
        files = sorted(path.name for path in (folder / "last").iterdir())
        with safetensors.safe_open(folder / "last" / "model.safetensors", "pt") as saved:
            names = sorted(saved.keys())
        one = _gone_on_in_one_process(rank, folder, tokens)
        chosen = json.loads((folder / "last" / "hidrop.json").read_text())["schedule"]["selection"]
    wanted = again if expected is None else expected["parameters"]
    return {
        **result,
        "resumed": apart(again, wanted),
        "files": files,
        "extra": [name for name in names if "hidrop" in name],
        "selection": chosen,
        **one,
    }


def _resumed(rank: int, stage: int, folder: Path) -> dict[str, Any]:
    """The parameters behind the third step of a new model that goes on from the second."""
    model = compiled(frozen(model_of(seed=9).train()), LEARNING)
    with launched(rank):
        made = _trainer(folder, stage, model, WORDS)
        made.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return full_parameters(made.model)


def _gone_on_in_one_process(rank: int, folder: Path, tokens: Any) -> dict[str, Any]:
    """What was saved, in plain transformers, under its schedule again, and one step further."""
    if rank:
        return {"answers": True, "stepped": True, "bare": 0.0}
    plain = LlavaForConditionalGeneration.from_pretrained(folder / "last")
    bare = torch.load(folder / "bare" / "pytorch_model.bin")
    state = model_of().state_dict()
    state.update({name: bare[name] for name in state})
    whole = model_of()
    whole.load_state_dict(state)
    between = apart(parameters_alone(whole), parameters_alone(plain))
    hidrop.load(plain, folder / "last", backend="eager")
    inputs = inputs_of(plain, WORDS[rank], labels=False)
    found = plain.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
    before = parameters_alone(plain)
    train_alone(plain.train(), [inputs_of(plain, WORDS[rank])], 1)
    moved = [not torch.equal(p, before[n]) for n, p in plain.named_parameters()]
    return {
        "answers": torch.equal(found, tokens),
        "stepped": sum(moved) > len(moved) / 2,
        "bare": between,
    }
