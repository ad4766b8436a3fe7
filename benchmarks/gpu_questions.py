"""Questions of `gpu.py` that only a GPU answers: captures that fail, training under graphs, Inductor, attention."""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import geometries
import torch
import transformers

import hidrop_fx as hidrop
from hidrop_fx.runtime.cuda_graphs.capturing import Captures
from hidrop_fx.runtime.hf.binding import require_runtime

ROOT = Path(__file__).parents[1]
SCHEDULE = "inject=1,prune=2:32,exit=3"
SHAPE = {"vision_tokens": 576, "text_tokens": 24}
NEEDS_CUDA = {"left out": "needs CUDA"}


def versions(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the run stands on."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if options.device != "cpu":
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            # 0 matrix products, 1 flash, 2 memory-efficient, 3 cuDNN
            "attention_order": [int(kind) for kind in torch._C._get_sdp_priority_order()],
        }
    return found


def failed_capture(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a capture that fails leaves behind: the stream, random numbers, the allocator, the pool.

    Plainly, and then as the product captures, which gives all of it back.
    """
    if options.device == "cpu":
        return NEEDS_CUDA
    pool, x = torch.cuda.graph_pool_handle(), torch.ones(8, device="cuda")
    before = torch.cuda.current_stream()
    found = {"raises": _outcome(partial(_capture, pool, lambda: (x + 1).sum().item()))}
    found["stream is back"] = str(torch.cuda.current_stream() == before)
    torch.cuda.set_stream(before)
    found |= _after_a_capture(partial(_capture, pool, lambda: x + 1))
    torch.cuda.set_stream(before)
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    captures = Captures(x.device)
    found["the product's: raises"] = _outcome(
        partial(_recorded_by, captures, lambda: (x + 1).sum().item())
    )
    found["the product's: stream is back"] = str(torch.cuda.current_stream() == before)
    after = _after_a_capture(partial(_recorded_by, captures, lambda: x + 1))
    return found | {f"the product's: {name}": outcome for name, outcome in after.items()}


def recorded_training(options: argparse.Namespace) -> dict[str, Any]:
    """Return the norm of a gradient, plain and recorded, also with AccumulateGrad nodes held, as DDP holds them."""
    found: dict[str, Any] = {}
    for held in (False, True):
        for graphs in (False, True):
            model = _compiled(options, cuda_graphs=graphs, backend="eager").train()
            nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
            if not held:
                nodes.clear()
            inputs = geometries.prompt(model, batch=2, **SHAPE)
            labels = inputs["input_ids"].clone()
            labels[:, :-4] = -100
            for _ in range(3):  # the second records, the third replays
                model.zero_grad()
                _forward(model, inputs, labels=labels, use_cache=False).loss.backward()
            weight = model.get_decoder().layers[-1].mlp.up_proj.weight
            found[f"graphs={graphs}, nodes held={held}"] = weight.grad.norm().item()
            found[f"recorded={graphs}, held={held}"] = _recorded(model)
    return found


def inductor(options: argparse.Namespace) -> dict[str, Any]:
    """Return whether Inductor's answers are those of eager mode, what fell back, what another length compiles."""
    if options.compiler != "inductor":
        return {"left out": "needs Inductor"}
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = _compiled(options, backend="eager").to(dtype)
        for graphs in (False, True):
            model = _compiled(options, cuda_graphs=graphs).to(dtype)
            model.load_state_dict(plain.state_dict())
            begun, same = time.perf_counter(), []
            for text in (24, 30, 61):
                shape = {**SHAPE, "text_tokens": text}
                inputs = geometries.prompt(plain, batch=2, **shape)
                want, got = (_forward(m, inputs).logits.argmax(-1) for m in (plain, model))
                same.append((want == got).float().mean().item())
            log = require_runtime(model, "").programs.log
            compiled = len(log.entries)
            _forward(model, geometries.prompt(plain, batch=2, **{**SHAPE, "text_tokens": 43}))
            found[f"{dtype}, graphs={graphs}"] = {
                "share of equal tokens": same,
                "fell back": [str(entry) for entry in log.fallbacks],
                "compiled": compiled,
                "more for another length": len(log.entries) - compiled,
                "recorded": _recorded(model),
                "s": round(time.perf_counter() - begun, 1),
            }
    return found


def attention_plans(options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of the first and the second attention at lengths never seen, with cuDNN and without."""
    if options.device == "cpu":
        return NEEDS_CUDA
    found: dict[str, Any] = {}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for allowed, start in ((True, 301), (False, 401)):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            for kind in ("prefill", "decode"):
                first, again = [], []
                for length in range(start, start + 6):
                    call = partial(_attention, kind, length)
                    first.append(_milliseconds(call))
                    again.append(_milliseconds(call))
                found[f"cuDNN {allowed}, {kind}"] = {"first": first, "again": again}
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return found


def varlen(options: argparse.Namespace) -> dict[str, Any]:
    """Return whether packed attention gives the tokens of the default kernel, one row padded."""
    if options.device == "cpu":
        return NEEDS_CUDA
    plain = _compiled(options, backend="eager").to(torch.bfloat16)
    packed = _compiled(options, backend="eager", attention="varlen", dtype=torch.bfloat16)
    packed.load_state_dict(plain.state_dict())
    inputs = geometries.prompt(plain, batch=2, **SHAPE)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2] = 0
    want, got = (_forward(m, inputs, attention_mask=mask).logits for m in (plain, packed))
    same = want[:, -1].argmax(-1) == got[:, -1].argmax(-1)
    return {"same tokens": same.tolist(), "largest difference": (want - got).abs().max().item()}


def recording_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Return the MiB that the allocator holds after each of nine recordings."""
    if options.device == "cpu":
        return NEEDS_CUDA
    model = _compiled(options, cuda_graphs=True, backend="eager", bucket_multiple=16)
    torch.cuda.empty_cache()
    held = []
    for text in range(16, 160, 16):
        inputs = geometries.prompt(model, batch=1, **{**SHAPE, "text_tokens": text})
        for _ in range(2):
            _forward(model, inputs, use_cache=False)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved() >> 20)
    return {"MiB": held}


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Return the end of pytest's output over the tests that run on a GPU where there is one."""
    if options.device == "cpu":
        return NEEDS_CUDA
    return {
        "output": _pytest("-k", "cuda", "tests/runtime", "tests/passes", "tests/ops", limit=140)
    }


def sanitizer(options: argparse.Namespace) -> dict[str, Any]:
    """Return the same of the side stream's tests under PyTorch's stream sanitizer."""
    if options.device == "cpu":
        return NEEDS_CUDA
    path = "tests/passes/test_overlap_vision.py"
    return {"output": _pytest("-k", "cuda", path, limit=70, TORCH_CUDA_SANITIZER="1")}


def _compiled(
    options: argparse.Namespace, *, dtype: torch.dtype | None = None, **given: Any
) -> Any:
    torch.manual_seed(0)
    model = geometries.build(geometries.SIZES["tiny"], options.device)
    return hidrop.compile(model if dtype is None else model.to(dtype), SCHEDULE, **given)


def _forward(model: Any, inputs: dict[str, Any], **given: Any) -> Any:
    # forward takes its images out of the mapping that it is given.
    images = dict(inputs["mm_encoder_outputs"])
    with torch.set_grad_enabled(model.training):
        return model(**{**inputs, "mm_encoder_outputs": images, **given})


def _recorded(model: Any) -> int:
    graphs = require_runtime(model, "").graphs
    return 0 if graphs is None else len(graphs.entries)


def _capture(pool: Any, body: Any) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, capture_error_mode="thread_local"):
        body()


def _recorded_by(captures: Captures, body: Any) -> None:
    with captures.aside():
        captures.record(body)


def _after_a_capture(another: Any) -> dict[str, str]:
    """Return what works after a capture that failed, another one last."""
    actions = {
        "rand": partial(torch.rand, 2, device="cuda"),
        "empty_cache": torch.cuda.empty_cache,
        "next capture": another,
    }
    return {name: _outcome(action) for name, action in actions.items()}


def _outcome(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return "works"


def _attention(kind: str, length: int) -> None:
    key = torch.randn(length, 1, 8, 128, device="cuda", dtype=torch.bfloat16).permute(1, 2, 0, 3)
    query = key if kind == "prefill" else key[:, :, :1]
    mask = None
    if kind == "decode":
        mask = torch.ones(1, 1, 1, length, device="cuda", dtype=torch.bool)
    torch.nn.functional.scaled_dot_product_attention(
        query, key, key, attn_mask=mask, is_causal=mask is None
    )


def _milliseconds(call: Any) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - begun) * 1e3, 2)


def _pytest(*arguments: str, limit: int, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    try:
        ran = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return f"not done after {limit} s: {output[-2000:]!r}"
    return (ran.stdout + ran.stderr)[-3000:]
