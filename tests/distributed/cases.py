"""What `test_fsdp2` runs in each of two processes: one function a case, called with the rank."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.distributed import agreement
from tests.support import counter
from tests.support.families import CASES, make_batch
from tests.support.families import IMAGE as FAMILY_IMAGE
from tests.support.models import IMAGE
from tests.support.sharded import (
    ROWS,
    WORDS,
    apart,
    full,
    full_gradients,
    inputs_of,
    mean_of_ranks,
    mesh,
    model_of,
    shard,
    train,
)

SCHEDULE = "inject=1,prune=2:6,exit=3"
LEARNING = "inject=1,prune=1:6,selection=dtopk"
BY_TOWER = "before=visionzip(dominant=4,contextual=2),inject=1,prune=2:3,exit=3"
BY_TEXT = "before=cdpruner(tokens=6),inject=1,prune=2:3,exit=3"


def compared(
    rank: int,
    *,
    rows: Any = ROWS,
    schedule: str | None = SCHEDULE,
    first: str = "compile",
    padding: str = "right",
    backend: str = "eager",
    freeze: Any = None,
    steps: int = 3,
    answers: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a sharded model on a rank's rows, and one process's model on all rows; return how far they are apart.

    Args:
        answers: afterwards, generate for the rank's rows, and on the first rank compare.
    """

    def made() -> Any:
        model = model_of().train()
        if freeze is not None:
            freeze(model)
        return model

    def compiled(model: Any) -> Any:
        return model if schedule is None else hidrop.compile(model, schedule, backend=backend)

    expected: dict[str, Any] = {"losses": None, "gradients": None, "parameters": None}
    if rank == 0:  # the other would compute the same
        alone = compiled(made())
        expected = train(alone, [inputs_of(alone, each, padding) for each in rows], steps)
    model = made()
    if first == "compile":
        model = shard(compiled(model), **options)
    else:
        model = compiled(shard(model, **options))
    found = train(model, [inputs_of(model, rows[rank], padding)], steps)
    losses = mean_of_ranks(found["losses"])
    tokens, wanted = None, None
    if answers:
        own = inputs_of(model, rows[rank], labels=False)
        tokens = model.eval().generate(**own, max_new_tokens=4, do_sample=False).tolist()
        wanted = tokens
        if rank == 0:
            wanted = alone.eval().generate(**own, max_new_tokens=4, do_sample=False).tolist()
    return {
        "tokens": tokens,
        "wanted": wanted,
        "losses": max(
            abs(a - b) / abs(b) for a, b in zip(losses, expected["losses"] or losses, strict=True)
        ),
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
        "count": len(found["gradients"]),
    }


def compiled_first(rank: int) -> Any:
    return compared(rank)


def sharded_first(rank: int) -> Any:
    return compared(rank, first="shard")


def no_images(rank: int) -> Any:
    return compared(rank, rows=WORDS, schedule=LEARNING, answers=True)


def _frozen(model: Any) -> None:
    """As in LLaVA's first stage: the projector alone is trained."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def frozen_decoder(rank: int) -> Any:
    """One rank has an answer straight behind an image, whose feature is a text position; the other has not."""
    rows = [[[5, 6, 7, IMAGE, 8, 9], [9, 10, IMAGE, 11]], [[13, IMAGE, 14], [5, 13, 16, IMAGE, 17]]]
    return compared(rank, rows=rows, freeze=_frozen, schedule="inject=2,prune=2:6,exit=3")


def frozen_without_images(rank: int) -> Any:
    return compared(rank, rows=WORDS, freeze=_frozen)


def dtopk(rank: int) -> Any:
    return compared(rank, schedule=LEARNING)


def previous_layer(rank: int) -> Any:
    """Scores at layer 2 by layer 1's attention."""
    return compared(rank, schedule="fastv")


def reduced_by_tower(rank: int) -> Any:
    """The tower is read while its layers are gathered, and the projector runs twice; the other rank has words alone."""
    return compared(rank, rows=WORDS, schedule=BY_TOWER, answers=True)


def reduced_by_text(rank: int) -> Any:
    """The embedding, in a unit of its own with a layer, is called twice; the other rank has words alone."""
    return compared(rank, rows=WORDS, schedule=BY_TEXT, ends=True)


def identity(rank: int) -> Any:
    return compared(rank, schedule="inject=0")


def answers(rank: int) -> Any:
    """Greedy tokens and logits of the two ranks' rows, one of which have no image, sharded and not; after `restore`, those of plain transformers."""
    plain = model_of()
    alone = hidrop.compile(model_of(), SCHEDULE, backend="eager")
    own = inputs_of(alone, WORDS[rank], "left", labels=False)
    expected = alone.generate(**own, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        expected_logits = alone(**own).logits
    model = shard(hidrop.compile(model_of(), SCHEDULE, backend="eager"))
    with counter.expect(captures=1):
        found = model.generate(**own, max_new_tokens=5, do_sample=False)
        with torch.no_grad():
            logits = model(**own).logits
    beams = model.generate(**own, max_new_tokens=3, num_beams=2, do_sample=False)
    expected_beams = alone.generate(**own, max_new_tokens=3, num_beams=2, do_sample=False)
    layers, whole = model.get_decoder().layers, plain.get_decoder().layers
    held = sum(p.to_local().numel() for p in layers.parameters())
    hidrop.restore(model)
    shown = inputs_of(
        plain, ROWS[rank], labels=False
    )  # plain transformers would wait without images
    with torch.no_grad():
        restored = model(**shown).logits
    return {
        "found": found,
        "expected": expected,
        "beams": beams,
        "expected_beams": expected_beams,
        "logits": float((logits - expected_logits).abs().max()),
        "restored": float((restored - plain(**shown).logits).abs().max()),
        "left": [n for m in model.modules() for n in vars(m) if "hidrop" in n or n == "forward"],
        "held": held / sum(p.numel() for p in whole.parameters()),
    }


def different_schedules(rank: int) -> Any:
    """Each rank learns what the other runs, and does not wait for it."""
    model = shard(hidrop.compile(model_of(), f"inject=1,exit={2 + rank}", backend="eager"))
    started = time.monotonic()
    try:
        model(**inputs_of(model, ROWS[rank]))
    except hidrop.HidropError as error:
        return {"message": str(error), "seconds": time.monotonic() - started}
    return {"message": "none", "seconds": 0.0}


def one_rank_alone(rank: int) -> Any:
    """The other rank runs plain transformers; its process is ended by the first's end."""
    agreement.WAIT_SECONDS = 5.0
    model = model_of() if rank else hidrop.compile(model_of(), SCHEDULE, backend="eager")
    return float(shard(model)(**inputs_of(model, ROWS[rank])).loss)


def too_late(rank: int) -> Any:
    """What nothing gathers, and what no call of a compiled model reaches, is named."""
    found = {}
    for name, change in (
        ("inside", lambda m: m.get_decoder().layers[1].mlp),
        ("around", lambda m: m.get_decoder()),
        ("tower", lambda m: m.model.vision_tower),
    ):
        model = model_of()
        torch.distributed.fsdp.fully_shard(change(model), mesh=mesh())
        try:
            hidrop.compile(model, SCHEDULE, backend="eager")
        except hidrop.HidropError as error:
            found[name] = str(error)
    return found


# Units of several layers.


def grouped(rank: int) -> Any:
    """One unit of a text-only layer, the layer of the injection and the filter layer; the other rank has words alone."""
    return compared(rank, rows=WORDS, first="shard", group=3, answers=True)


def grouped_all(rank: int) -> Any:
    return compared(rank, group=4, backend="aot_eager", reshard_after_forward=False)


def grouped_with_what_is_around(rank: int) -> Any:
    return compared(rank, ends=True, schedule="fastv", answers=True)


def grouped_and_frozen(rank: int) -> Any:
    return compared(rank, group=2, freeze=_frozen, schedule="inject=2,prune=2:6,exit=3")


def wrapped(rank: int) -> Any:
    """`hidrop.fully_shard` of a model that learns ratios: the same, and the ratios are a unit of their own."""
    found = compared(rank, schedule=LEARNING, wrapped=2, answers=True)
    model = hidrop.compile(model_of(), LEARNING, backend="eager")
    hidrop.fully_shard(model, group_shallow=2)
    units = [
        name
        for name, m in model.named_modules()
        if torch.distributed.fsdp.FSDPModule in type(m).__mro__
    ]
    messages = []
    for given in ({}, {"group_shallow": 9}, {"group_shallow": True}):
        again = model if not given else model_of()
        try:
            hidrop.fully_shard(again, **given)
        except hidrop.HidropError as error:
            messages.append(str(error))
    return {**found, "units": units, "messages": messages}


def wrapped_by_plan(rank: int) -> Any:
    """A plan on links that are slow to start puts the two layers in front of the injection together; a policy of bf16 keeps ratios in fp32."""
    slow = hidrop.Cluster(world_size=2, latency=1.0)
    model = hidrop.compile(
        model_of().train(), "inject=2,prune=2:6,selection=dtopk", backend="eager"
    )
    costs = hidrop.plan(hidrop.schedules(model)["default"], model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    planned = dataclasses.replace(costs, cluster=slow)
    hidrop.fully_shard(model, mesh(), group_shallow=True, costs=planned, mp_policy=policy)
    layers = model.get_decoder().layers
    states = [layer._get_fsdp_state() for layer in layers]
    losses = train(model, [inputs_of(model, ROWS[rank])], 2)["losses"]
    return {
        "together": [state is states[0] for state in states],
        "finite": all(map(math.isfinite, losses)),
        "ratios": str(full(model.hidrop_ratios.values).dtype),
    }


# What takes longer.


def aot_eager(rank: int) -> Any:
    return _compiled_once(rank, "aot_eager")


def inductor(rank: int) -> Any:
    return _compiled_once(rank, "inductor")


def _compiled_once(rank: int, backend: str) -> Any:
    """Train, then two more steps on other lengths, which must compile nothing."""
    with counter.expect(fallbacks=0):
        found = compared(rank, backend=backend)
    model = shard(hidrop.compile(model_of().train(), SCHEDULE, backend=backend))
    train(model, [inputs_of(model, ROWS[rank])], 2)
    longer = [[*row, 20 + rank, 21] for row in ROWS[rank]]
    with counter.expect(captures=0, compiled=0, fallbacks=0):
        train(model, [inputs_of(model, longer)], 2)
    return found


def kept_gathered(rank: int) -> Any:
    return compared(rank, reshard_after_forward=False)


def checkpointed(rank: int) -> Any:
    return compared(rank, backend="aot_eager", freeze=_checkpoint)


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def root_alone(rank: int) -> Any:
    """One unit holds everything."""
    expected = model_of().train()
    hidrop.compile(expected, SCHEDULE, backend="eager")
    wanted = train(expected, [inputs_of(expected, each) for each in ROWS])
    model = hidrop.compile(model_of().train(), SCHEDULE, backend="eager")
    torch.distributed.fsdp.fully_shard(model, mesh=mesh())
    found = train(model, [inputs_of(model, ROWS[rank])])
    return {
        "losses": max(
            abs(a - b)
            for a, b in zip(mean_of_ranks(found["losses"]), wanted["losses"], strict=True)
        ),
        "gradients": apart(found["gradients"], wanted["gradients"]),
        "parameters": apart(found["parameters"], wanted["parameters"]),
    }


def accumulated(rank: int) -> Any:
    """Two batches a rank, gradients reduced behind the second alone."""
    expected = hidrop.compile(model_of().train(), SCHEDULE, backend="eager")
    train(expected, [inputs_of(expected, rows) for rows in ROWS], 1)
    wanted = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    model = shard(hidrop.compile(model_of().train(), SCHEDULE, backend="eager"))
    for last, rows in enumerate((ROWS[rank], ROWS[1 - rank])):
        model.set_requires_gradient_sync(bool(last))
        (model(**inputs_of(model, rows)).loss / 2).backward()
    return {"gradients": apart(full_gradients(model), wanted)}


def adapters(rank: int) -> Any:
    """LoRA in the decoder; PEFT's model is the root."""
    from peft import LoraConfig, get_peft_model

    def made() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(
            target_modules=r".*language_model.*(q_proj|up_proj)", r=4, init_lora_weights=False
        )
        return get_peft_model(hidrop.compile(model_of(), SCHEDULE, backend="eager"), config).train()

    alone = made()
    expected = train(alone, [inputs_of(alone.get_base_model(), rows) for rows in ROWS])
    model = made()
    shard(model.get_base_model(), root=model)
    found = train(model, [inputs_of(model.get_base_model(), ROWS[rank])])
    return {
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
        "count": len(found["gradients"]),
    }


def mixed_precision(rank: int) -> Any:
    """Under the identity schedule and a policy of bf16: what transformers' own model gives under it, bit by bit."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    rows = [[[5, IMAGE, 6, 7, 8]], [[13, IMAGE, 14, 15, 16]]][rank]
    plain = shard(model_of().train(), mp_policy=policy)
    expected = train(plain, [inputs_of(plain, rows)], 1)
    model = hidrop.compile(model_of().train(), hidrop.Schedule(), backend="eager")
    found = train(shard(model, mp_policy=policy), [inputs_of(model, rows)], 1)
    return {
        "losses": abs(found["losses"][0] - expected["losses"][0]),
        "gradients": apart(found["gradients"], expected["gradients"]),
    }


def ratios_of_their_own(rank: int) -> Any:
    """Learned ratios in a unit of their own, whose hooks never run."""
    alone = hidrop.compile(model_of().train(), LEARNING, backend="eager")
    expected = train(alone, [inputs_of(alone, each) for each in ROWS])
    model = hidrop.compile(model_of().train(), LEARNING, backend="eager")
    torch.distributed.fsdp.fully_shard(model.hidrop_ratios, mesh=mesh())
    found = train(shard(model), [inputs_of(model, ROWS[rank])])
    return {
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
    }


def saved(rank: int) -> Any:
    """A full state dict and `hidrop.json` of a sharded model, in plain transformers, in one process and sharded again."""
    folder = Path(tempfile.gettempdir()) / f"hidrop_saved_{os.getppid()}"
    model = shard(hidrop.compile(model_of().train(), LEARNING, backend="eager"))
    train(model, [inputs_of(model, ROWS[rank])], 2)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(folder, is_main_process=rank == 0, state_dict=state)
    distributed.barrier()
    own = inputs_of(model, ROWS[rank])
    model.eval()
    with torch.no_grad():
        expected = model(**own).logits
    ratios = full(model.hidrop_ratios.values)
    hidrop.restore(model)
    with torch.no_grad():
        plain_logits = model(**own).logits
    plain = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        found = float((plain(**own).logits - plain_logits).abs().max())
    again = shard(hidrop.compile(model_of(seed=7), LEARNING, backend="eager"))
    loaded = plain.state_dict() if rank == 0 else {}
    set_model_state_dict(
        again, loaded, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    hidrop.load(again, folder)
    with torch.no_grad():
        found = max(found, float((again(**own).logits - expected).abs().max()))
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    return {
        "found": found,
        "ratios": float((full(again.hidrop_ratios.values) - ratios).abs().max()),
    }


def reconfigured(rank: int) -> Any:
    """CUDA graphs, the whole lowering and the vision lane are left off, by one line each."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hidrop_fx")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    options: Any = {"cuda_graphs": True, "lowering": "whole", "overlap_vision": True}
    model = shard(hidrop.compile(model_of(), SCHEDULE, backend="eager", **options))
    for _ in range(2):
        model.generate(**inputs_of(model, ROWS[rank], labels=False), max_new_tokens=3)
    logger.removeHandler(handler)
    assert str(hidrop.inspect(model))
    counts = [
        sum(part in line for line in lines)
        for part in ("without CUDA graphs", "one by one", "not beside it")
    ]
    return {"lines": counts[0] if len(set(counts)) == 1 else counts}


def qwen(rank: int) -> Any:
    """A tower of patches, with features that the decoder adds between its layers; the second rank has words alone."""
    case = CASES["qwen3_vl"]
    rows = [[[5, FAMILY_IMAGE, 6, 7, 8], [9, 10, 11, 12]], [[8, 9, 10, 11], [13, 14, 15, 16, 17]]]

    def made() -> Any:
        torch.manual_seed(5)
        return hidrop.compile(case.make().train(), "inject=1,exit=2", backend="eager")

    def given(model: Any, rows: Any) -> dict[str, Any]:
        torch.manual_seed(6)
        inputs = dict(make_batch(case, model, rows, padding="right").inputs)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        return {**inputs, "labels": labels.where(inputs["attention_mask"] > 0, -100)}

    alone = made()
    expected = train(alone, [given(alone, each) for each in rows], 2)
    model = made()
    over = mesh()
    for layer in (*model.get_decoder().layers, *model.model.visual.blocks, model):
        torch.distributed.fsdp.fully_shard(layer, mesh=over)
    found = train(model, [given(alone, rows[rank])], 2)
    return {
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
    }
