"""What `test_tensor_parallel` runs in each of two processes: one function a case, called with the rank.

Both processes see the same batch, and compute it together; the first also runs a whole model on it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from transformers import LlavaForConditionalGeneration
from transformers.distributed.configuration_utils import DistributedConfig

import hidrop_fx as hidrop
import hidrop_fx.passes.processes as processes
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.backbones import tiny_backbone
from tests.support.divided import GATHERED, divide, same_everywhere
from tests.support.models import IMAGE
from tests.support.sharded import apart, full, full_gradients, inputs_of, model_of, train

ROWS = [[5, IMAGE, 6, 8, 7], [9, 10, IMAGE, 11, IMAGE, 8, 13, 14], [8, 9, 10]]
LONGER = [[*row, 20, 21] for row in ROWS]
SCHEDULE = "inject=1,prune=2:4,exit=3"
LEARNING = "inject=1,prune=1:6+2:3,selection=dtopk"
GROUPED = {"heads": 4, "kv_heads": 2}


def compared(
    rank: int,
    *,
    schedule: str = SCHEDULE,
    backend: str = "eager",
    padding: str = "right",
    plan: Any = "auto",
    freeze: Any = None,
    steps: int = 3,
    device: str = "cpu",
    answers: int = 4,
    make: Any = model_of,
    **model_options: Any,
) -> dict[str, Any]:
    """Train a divided model and a whole one, then let both answer; return how far they are apart."""

    def made() -> Any:
        model = make(**model_options).to(device).train()
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and name.endswith("k_proj.bias"):
                # No gradient but rounding, of which AdamW would make steps.
                parameter.requires_grad_(False)
        if freeze is not None:
            freeze(model)
        return model

    expected: dict[str, Any] = {"losses": None, "gradients": None, "parameters": None}
    wanted: Any = None
    if rank == 0:  # the other would compute the same
        alone = hidrop.compile(made(), schedule, backend=backend)
        expected = train(alone, [inputs_of(alone, ROWS, padding)], steps)
        wanted = _answers(alone, answers)
    distributed.barrier()  # the first calls of a divided model wait 45 s for each other
    model = hidrop.compile(divide(made(), plan), schedule, backend=backend)
    found = train(model, [inputs_of(model, ROWS, padding)], steps)
    tokens = _answers(model, answers)
    pairs = zip(found["losses"], expected["losses"] or found["losses"], strict=True)
    return {
        "losses": max(abs(a - b) / abs(b) for a, b in pairs),
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
        "count": len(found["gradients"]),
        "tokens": tokens,
        "wanted": tokens if wanted is None else wanted,
    }


def _answers(model: Any, count: int) -> list[list[int]]:
    inputs = inputs_of(model, ROWS, labels=False)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    training = model.training
    found: Tensor = model.eval().generate(**inputs, max_new_tokens=count, **options)
    model.train(training)
    tokens: list[list[int]] = found.tolist()
    return tokens


def default(rank: int) -> Any:
    """Learned ratios, whose gradient comes through the values of all heads; norms of heads; two heads a key; who stays."""
    short = partial(model_of, 2, backbone="qwen3", **GROUPED)
    found = compared(rank, make=short, schedule="prune=1:5,selection=dtopk")
    return {**found, **_choices(short, "prune=1:5", "prune_1")}


def learned(rank: int) -> Any:
    return compared(rank, backbone="qwen3", schedule=LEARNING, **GROUPED)


def fixed(rank: int) -> Any:
    return compared(rank, padding="left")


def biases(rank: int) -> Any:
    return compared(rank, backbone="qwen2", **GROUPED)


def windows(rank: int) -> Any:
    return compared(rank, backbone="mistral", sliding_window=6)


def soft_ranks(rank: int) -> Any:
    """In fp64: soft ranks have gradients that grow rounding by a hundred, in fp32 to 1.1e-5."""

    def double(**options: Any) -> Any:
        return model_of(**options).double()

    return compared(rank, schedule="inject=1,prune=2:4,selection=dtopk,rank=soft", make=double)


def identity(rank: int) -> Any:
    return compared(rank, schedule="inject=0")


def gathered(rank: int) -> Any:
    """Every process has all heads, as under the plan of Phi 3; the MLP is divided by its own rules."""
    return compared(rank, schedule=LEARNING, plan=GATHERED)


def experts(rank: int) -> Any:
    """Each expert's channels are divided, and all processes choose the same experts."""
    return compared(rank, make=partial(tiny_backbone, "mixtral"))


def phi(rank: int) -> Any:
    """Fused projections: columns are gathered, and rows take their part of them."""
    return compared(rank, make=partial(tiny_backbone, "phi3"))


def capped(rank: int) -> Any:
    """Softmax of capped logits, windows, norms behind the sums."""
    return compared(rank, make=partial(tiny_backbone, "gemma2"))


def projector_alone(rank: int) -> Any:
    def freeze(model: Any) -> None:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)

    return compared(rank, freeze=freeze)


def checkpointed(rank: int) -> Any:
    def freeze(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    return compared(rank, freeze=freeze, backend="aot_eager")


def _compiled_once(rank: int, backend: str) -> Any:
    """Train and answer, then on other lengths, which compile nothing."""
    found = compared(rank, backend=backend, backbone="qwen3", **GROUPED)
    model = divide(model_of(backbone="qwen3", **GROUPED).train())
    hidrop.compile(model, SCHEDULE, backend=backend)
    train(model, [inputs_of(model, ROWS, "right")], 2)
    _answers(model, 3)
    with counter.expect(captures=0, compiled=0, fallbacks=0):
        train(model, [inputs_of(model, LONGER, "right")], 2)
        _answers(model, 5)
    return found


def aot_eager(rank: int) -> Any:
    return _compiled_once(rank, "aot_eager")


def inductor(rank: int) -> Any:
    return _compiled_once(rank, "inductor")


def accumulated(rank: int) -> Any:
    """Gradients of two batches add up, in norms of heads too, where transformers' own would be summed twice."""
    found = []
    for make in (model_of, _divided):
        model = make(backbone="qwen3").train()
        model.model.vision_tower.requires_grad_(False)
        hidrop.compile(model, SCHEDULE, backend="eager")
        for rows in (ROWS, LONGER):
            model(**inputs_of(model, rows)).loss.backward()
        found.append(full_gradients(model))
    return {"gradients": apart(found[1], found[0])}


def _divided(**options: Any) -> Any:
    return divide(model_of(**options))


def trained_before(rank: int) -> Any:
    """transformers trains first, and again after `restore`: its hooks on norms of heads sum gradients then, and never twice."""
    alone = model_of(backbone="qwen3").train()
    model = divide(model_of(backbone="qwen3").train())
    apart_by = []
    for each in (alone, model):
        for layer in each.model.vision_tower.encoder.layers:
            layer.self_attn.k_proj.bias.requires_grad_(False)
    for state in ("plain", "compiled", "restored"):
        for each in (alone, model):
            each.zero_grad()
            if state == "compiled":
                hidrop.compile(each, SCHEDULE, backend="eager")
            if state == "restored":
                hidrop.restore(each)
            each(**inputs_of(each, ROWS, "right")).loss.backward()
        apart_by.append(apart(full_gradients(model), full_gradients(alone)))
    return {"gradients": max(apart_by)}


# Choices.


def _kept(model: Any, segment: str) -> Tensor:
    """Return the columns of a segment's tokens in a prefill."""
    runtime, seen = runtime_of(model), {}
    assert runtime is not None
    runtime.on_outputs.append(lambda prepared, outputs: seen.update(outputs))
    with torch.no_grad():
        model(**inputs_of(model, ROWS, labels=False))
    found: Tensor = seen[f"columns_{segment}"]
    return found


def _choices(make: Any, schedule: str, segment: str) -> dict[str, bool]:
    """Compare the tokens that stay with those of one process, and those that each process's own heads would choose."""
    expected = _kept(hidrop.compile(make(), schedule, backend="eager"), segment)
    model = hidrop.compile(divide(make()), schedule, backend="eager")
    found = _kept(model, segment)
    with patch.object(processes, "mean_of_processes", lambda scores, group, size: scores):
        own = _kept(hidrop.compile(model, schedule, backend="eager"), segment)
    return {"equal": torch.equal(found, expected), "own_differ": not same_everywhere(own)}


METHODS = (
    "fastv",
    "pyramiddrop(layers=(1,2),keeps=(0.5,0.25))",
    "sparsevlm(layers=(2,3),keeps=(4,2))",
    "sparsevlm(layers=(2,3),keeps=(4,2),version='v2',heads=3)",
    "ivc-prune(layer=2)",
    "v2drop(layers=(2,),keeps=(0.5,))",
    "vtw(layer=2)",
    "vica(layers=(0,2))",
    "voco(token_id=8)",
    "divprune(ratio=0.4)",
    "visionzip(dominant=3,contextual=2)",
    "snapkv(window=2,capacity=6)",
    "pyramidkv(window=2,capacity=6)",
    "mixkv(window=2,capacity=6)",
    "prune=2:4,score=all_text_l2",
    "prune=1:4,exit=3,merge=nearest_key",
)


def methods(rank: int) -> Any:
    """Answers of each method by two processes, and by one."""
    found = {}
    alone, model = model_of(**GROUPED), divide(model_of(**GROUPED))
    for text in METHODS:  # over the same captures
        hidrop.compile(alone, text, backend="eager")
        hidrop.compile(model, text, backend="eager")
        inputs = inputs_of(alone, ROWS, labels=False)
        with torch.no_grad():
            distance = _distance(model(**inputs).logits, alone(**inputs).logits)
        found[text] = distance, _answers(model, 4) == _answers(alone, 4)
    return found


def drawn(rank: int) -> Any:
    """A score that is drawn is that of the first process: both go on with the same tokens."""
    torch.manual_seed(rank)
    model = hidrop.compile(divide(model_of()), "prune=2:4,score=random", backend="eager")
    first, second = _kept(model, "prune_2"), _kept(model, "prune_2")
    return {"same": same_everywhere(first), "anew": not torch.equal(first, second)}


def refused(rank: int) -> Any:
    """What is refused, on both ranks alike."""
    found = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except hidrop.HidropError as error:
            found[name] = str(error)

    few = model_of(heads=4, kv_heads=1)
    attempt("heads", lambda: hidrop.compile(divide(few), SCHEDULE, backend="eager"))
    model = hidrop.compile(divide(model_of()), f"inject=1,exit={2 + rank}", backend="eager")
    attempt("schedules", lambda: model(**inputs_of(model, ROWS)))
    model = hidrop.compile(divide(model_of()), SCHEDULE, backend="eager")
    attempt("compare", lambda: hidrop.compare(model, **inputs_of(model, ROWS, labels=False)))
    return found


# Loading and saving.


def _folder(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"hidrop_{name}_{os.getppid()}"


def loaded(rank: int) -> Any:
    """A model that `from_pretrained` divides: trained, saved, and loaded by plain transformers, in one process, and divided again."""
    start, folder = _folder("start"), _folder("saved")
    if rank == 0:
        model_of(**GROUPED).save_pretrained(start)
    distributed.barrier()
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    cls = LlavaForConditionalGeneration
    with patch.dict(os.environ, environment):
        own: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")}
        model = cls.from_pretrained(start, **own).train()
        held = sum(full_or_own.numel() for full_or_own in map(_own, model.parameters()))
        hidrop.compile(model, LEARNING, backend="eager")
        train(model, [inputs_of(model, ROWS)], 2)
        model.save_pretrained(folder)
        ratios = full(model.hidrop_ratios.values)
        shown = inputs_of(model, ROWS, labels=False)
        with torch.no_grad():
            expected = model.eval()(**shown).logits
        again = hidrop.load(cls.from_pretrained(folder, **own).eval(), folder, backend="eager")
    plain = cls.from_pretrained(folder).eval()
    restored = hidrop.restore(model).eval()
    with torch.no_grad():
        without = _distance(plain(**shown).logits, restored(**shown).logits)
        alone = hidrop.load(plain, folder, backend="eager")
        distances = [_distance(each(**shown).logits, expected) for each in (alone, again)]
    same = torch.equal(full(alone.hidrop_ratios.values), ratios)
    losses = train(alone.train(), [inputs_of(alone, ROWS)], 2)["losses"]
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(start)
        shutil.rmtree(folder)
    return {
        "distances": [without, *distances],
        "ratios": same,
        "goes_on": losses[1] < losses[0],
        "held": held / sum(p.numel() for p in plain.parameters()),
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _own(parameter: Any) -> Tensor:
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local


def reconfigured(rank: int) -> Any:
    """CUDA graphs and the vision lane are left off, by one line each; caches hold the heads of one process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hidrop_fx")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    options: Any = {"cuda_graphs": True, "lowering": "whole", "overlap_vision": True}
    model = hidrop.compile(divide(model_of()), SCHEDULE, backend="eager", **options)
    for _ in range(2):
        tokens = _answers(model, 3)
    logger.removeHandler(handler)
    assert str(hidrop.inspect(model))
    whole = hidrop.compile(model_of(), SCHEDULE, backend="eager")
    with torch.no_grad():
        caches = [
            each.eval()(**inputs_of(whole, ROWS, labels=False), use_cache=True).past_key_values
            for each in (model, whole)
        ]
    counts = [
        sum(part in line for line in lines) for part in ("without CUDA graphs", "not beside it")
    ]
    return {
        "lines": counts,
        "equal": tokens == _answers(whole, 3),
        "share": caches[0].nbytes / caches[1].nbytes,
    }


def on_gpus(rank: int) -> Any:
    """Over NCCL, a GPU each."""
    torch.cuda.set_device(rank)
    return compared(rank, backbone="qwen3", schedule=LEARNING, device=f"cuda:{rank}", **GROUPED)
