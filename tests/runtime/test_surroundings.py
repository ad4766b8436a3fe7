"""What a call runs under changes neither what is traced in it nor what it computes, and is as it was behind it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.testing._internal.logging_tensor import LoggingTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import hidrop_fx as hidrop
from hidrop_fx.surroundings import neutral_surroundings
from tests.support import counter
from tests.support.generation import new_tokens
from tests.support.gradients import assert_gradients_close, step
from tests.support.lowered import FILTERED, LAYERS, compiled_llama
from tests.support.models import IMAGE, batch, random_labels, tiny_llava

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8], [8, IMAGE, 9]]


class Passing(TorchDispatchMode):
    """A user's mode that looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def warnings_raised() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def kept(value: Tensor) -> Tensor:
    return value


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "a dispatch mode": Passing,
    "LoggingTensorMode": LoggingTensorMode,
    "CommDebugMode": CommDebugMode,
    "a function mode": Watching,
    "set_default_device": lambda: default_device("meta"),
    "with torch.device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": torch.autograd.detect_anomaly,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(kept, kept),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "warnings as errors": warnings_raised,
    "profiler": torch.profiler.profile,
    "fork_rng": lambda: torch.random.fork_rng(devices=[]),
}


# Its own bookkeeping fails on a tower that is called outside of the model, with Hugging Face's decoder too; and on
# two calls.
NO_GENERATE = ("CommDebugMode",)


def state() -> dict[str, Any]:
    """Return all that a call runs under and must leave as it was."""
    return {
        "dispatch modes": list(map(id, _get_current_dispatch_mode_stack())),
        "function modes": list(map(id, _get_current_function_mode_stack())),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "hooks of modules": list(torch.nn.modules.module._global_forward_hooks),
        "filters": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "torch's random state": torch.random.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "CURRENT_DEVICE": torch.utils._device.CURRENT_DEVICE,
    }


def made() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Return a compiled model that nothing was called of, a prompt, and a batch to train on."""
    model = hidrop.compile(tiny_llava(num_layers=LAYERS, kv_heads=2), FILTERED, backend="eager")
    inputs = batch(model, ROWS, padding="right")
    training = inputs | {"labels": random_labels(inputs)}
    training["labels"][:, 0] = -100
    return model, batch(model, ROWS), training


def results(
    model: Any,
    prompt: dict[str, Tensor],
    training: dict[str, Tensor],
    around: str | None = None,
) -> tuple[Any, ...]:
    """Run prefill, decode, and a training step, each in surroundings that it must leave as they were."""
    with surrounded(around), torch.no_grad():
        logits = model(**prompt).logits
    answers = None
    if around not in NO_GENERATE:
        with surrounded(around):
            answers = new_tokens(model, prompt, 3)
    model.train()
    with surrounded(around):
        loss, gradients = step(model, training)
    model.eval()
    return logits, answers, loss, gradients


@contextmanager
def surrounded(name: str | None) -> Iterator[None]:
    with nullcontext() if name is None else SURROUNDINGS[name]():
        before = state()
        yield
        assert state() == before


@pytest.fixture(scope="module")
def usual() -> tuple[Any, ...]:
    return results(*made())


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1] in (expected[1], None)
    torch.testing.assert_close(found[2], expected[2])
    assert_gradients_close(found[3], expected[3])


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_first_calls_inside_give_what_calls_outside_give(usual: tuple[Any, ...], name: str) -> None:
    model, prompt, training = made()
    assert_equal(results(model, prompt, training, name), usual)
    with counter.expect(captures=0, programs=None if name in NO_GENERATE else 0):
        assert_equal(results(model, prompt, training), usual)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_later_calls_inside_give_the_same(
    usual: tuple[Any, ...], name: str, one_model: tuple[Any, ...]
) -> None:
    with counter.expect(captures=0, programs=0):
        assert_equal(results(*one_model, name), usual)


@pytest.fixture(scope="module")
def one_model(usual: tuple[Any, ...]) -> tuple[Any, ...]:
    everything = made()
    assert_equal(results(*everything), usual)
    return everything


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_of_the_first_call(usual: tuple[Any, ...], mode: Any) -> None:
    model, prompt, training = made()
    with mode():
        before = state()
        assert torch.equal(model(**prompt).logits, usual[0])
        assert new_tokens(model, prompt, 3) == usual[1]
        assert state() == before
    assert_equal(results(model, prompt, training), usual)


@pytest.mark.parametrize("name", [*SURROUNDINGS, "autocast", "inference_mode"])
def test_a_capture_that_fails_leaves_them_as_they_were(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, _ = made()
    others: dict[str, Any] = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference_mode": torch.inference_mode,
    }

    def broken(*args: Any, **kwargs: Any) -> Any:
        random.random()
        torch.rand(3)
        torch.set_default_dtype(torch.float16)
        raise RuntimeError("no way")

    monkeypatch.setattr(torch.export, "export", broken)
    with (SURROUNDINGS | others)[name]():
        before = state()
        with pytest.raises(hidrop.CaptureError, match="no way"):
            model(**prompt)
        assert state() == before


def test_neutral_surroundings_are_those_of_a_fresh_process() -> None:
    with neutral_surroundings():
        fresh = state()
    with (
        Passing(),
        Watching(),
        torch.device("meta"),
        default_dtype(torch.float64),
        deterministic(),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        torch.autograd.set_detect_anomaly(True),
        warnings_raised(),
    ):
        before = state()
        with neutral_surroundings():
            inside = state()
            assert not any(action == "error" for action, *_ in warnings.filters)
        assert state() == before
    told = ("filters", "CURRENT_DEVICE", "filled", "autocast dtype")
    assert {k: v for k, v in inside.items() if k not in told} == {
        k: v for k, v in fresh.items() if k not in told
    }


# Random state.


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_first_call_draws_what_a_second_draws(backend: str) -> None:
    model, _ = compiled_llama(backend=backend)
    inputs = batch(model, ROWS)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        random.seed(3)
        found.append(model.generate(**inputs, do_sample=True, max_new_tokens=4).tolist())
        found.append(random.random())
    assert found[:2] == found[2:]


def test_dropout_of_a_first_training_call_is_that_of_a_second() -> None:
    model, _ = compiled_llama(backend="eager")
    model.config.get_text_config().attention_dropout = 0.3
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()
    inputs = batch(model, ROWS, padding="right")
    labels = random_labels(inputs)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(model(**inputs, labels=labels).loss.item())
    assert losses[0] == losses[1]


def test_warming_up_draws_nothing() -> None:
    model, _ = compiled_llama("inject=1,prune=1:4,score=random", backend="eager")
    before = torch.random.get_rng_state()
    hidrop.warmup(model, [hidrop.Shape(batch=2, text=6, new_tokens=2)], progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


# What a mode counts.


def decoder_flops(tokens: list[int], rows: int, model: Any) -> int:
    """Count the products of layers on so many tokens, and of a head on so many rows.

    Not those of attention, of which `FlopCounterMode` knows no kernel on a CPU.
    """
    config = model.config.get_text_config()
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * width // config.num_attention_heads
    weights = 2 * width * width + 2 * width * keys + 3 * width * inner
    return 2 * sum(tokens) * weights + 2 * rows * width * config.vocab_size


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_flops_are_those_that_are_executed(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = compiled_llama("inject=1,exit=2", backend=backend)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8]])
    with FlopCounterMode(display=False) as tower:
        model.get_image_features(inputs["pixel_values"])
    expected = decoder_flops([4, 13, 4], 13, model)
    with caplog.at_level("INFO", logger="hidrop_fx"), counter.expect(compiled=0):
        for _ in range(2):
            with FlopCounterMode(display=False) as counted:
                inside = model(**inputs).logits
            assert counted.get_total_flops() - tower.get_total_flops() == expected
    assert caplog.text.count("a dispatch mode is active") == (backend != "eager")
    with counter.expect(compiled=0 if backend == "eager" else range(1, 9)):
        torch.testing.assert_close(model(**inputs).logits, inside, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counted, counter.expect(compiled=0):
        model(**inputs)
    assert counted.get_total_flops() - tower.get_total_flops() == expected


def test_a_mode_sees_the_layers_where_graphs_are_recorded() -> None:
    model, _ = compiled_llama(backend="eager", cuda_graphs=True)
    inputs = batch(model, ROWS)
    expected = new_tokens(model, inputs, 3)
    for _ in range(2):
        with Passing() as mode, counter.expect(recorded=0):
            assert new_tokens(model, inputs, 3) == expected
        products = [f for f in mode.seen if f.overloadpacket is torch.ops.aten.mm]
        assert len(products) >= 3 * LAYERS * 7


def test_layers_are_recomputed_as_they_ran() -> None:
    """Under a mode that has ended when backward recomputes them."""
    losses = []
    for inside in (True, False):
        model, _ = compiled_llama(backend="aot_eager")
        model.train().gradient_checkpointing_enable()
        inputs = batch(model, ROWS, padding="right")
        with Passing() if inside else torch.enable_grad():
            loss = model(**inputs, labels=random_labels(inputs)).loss
        loss.backward()
        weight = model.get_decoder().layers[0].mlp.up_proj.weight
        losses.append((loss.detach(), weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


# What is compiled.


@torch.no_grad()
@pytest.mark.slow
def test_a_default_device_compiles_nothing_anew() -> None:
    model, _ = compiled_llama(backend="aot_eager")
    inputs = batch(model, ROWS)
    expected = new_tokens(model, inputs, 3)
    with counter.expect(captures=0, programs=0, compiled=0), default_device("meta"):
        assert new_tokens(model, inputs, 3) == expected


@pytest.mark.slow
@torch.no_grad()
def test_a_compiler_that_warns_is_no_error() -> None:
    model, _ = compiled_llama(backend="inductor")
    inputs = batch(model, [[5, 6, IMAGE, 7, 8]])
    with counter.expect(compiled=range(1, 9), fallbacks=0), warnings_raised():
        model(**inputs)


@torch.no_grad()
def test_weights_of_a_score_are_fp32_whatever_the_default_dtype() -> None:
    """Three query rows share a score: a third of it, rounded to bf16, orders tokens otherwise."""
    from hidrop_fx.ops.attention_scores import attention_scores
    from hidrop_fx.ops.tokens import survival_mask

    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 40, 8)
    columns = torch.arange(40)[None]
    rows = torch.tensor([[20, 30, 39]])
    table = torch.ones(1, 41, dtype=torch.bool)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            scores = attention_scores(query, key, columns, rows, 0.3)
            mask = survival_mask(
                scores, columns, table, torch.tensor(0.3, dtype=torch.float32), False
            )
            found.append((scores, mask))
    for scores, mask in found[1:]:
        assert scores.dtype == mask.dtype == torch.float32
        assert torch.equal(scores, found[0][0])
        assert torch.equal(mask, found[0][1])


@torch.no_grad()
def test_a_larger_run_under_a_default_device() -> None:
    """Every kind of generation, and the tools."""
    outputs = []
    for surroundings in (torch.enable_grad, lambda: torch.device("meta")):
        model, _ = compiled_llama(backend="eager")
        inputs = batch(model, ROWS)
        with surroundings():
            cached = model(**inputs, use_cache=True)
            token = cached.logits[:, -1:].argmax(dim=-1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            behind = model(
                input_ids=token, past_key_values=cached.past_key_values, attention_mask=mask
            ).logits
            report = hidrop.explain(model, **inputs)
            compared = hidrop.compare(model, **inputs, new_tokens=2)
        outputs.append((cached.logits, behind, [r.vision_tokens for r in report.rows], compared.ok))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[0][2:] == outputs[1][2:]
    assert outputs[0][3]


# Kinds of generation and schedules.

GENERATION: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
}
"""Those that transformers itself can do under a default device "meta": beam search is not one of them."""


@pytest.mark.parametrize("kind", GENERATION)
def test_kinds_of_generation_under_a_default_device(kind: str, one_model: tuple[Any, ...]) -> None:
    model = one_model[0]
    inputs = batch(model, ROWS[:1])
    found = []
    for around in (None, "set_default_device", "bfloat16"):
        torch.manual_seed(2)
        with surrounded_loosely(around):
            answer = model.generate(**inputs, max_new_tokens=4, **GENERATION[kind])
        found.append(getattr(answer, "sequences", answer).tolist())
    assert found[1:] == found[:1] * 2


def surrounded_loosely(name: str | None) -> AbstractContextManager[Any]:
    """Sampling draws, and so leaves another random state."""
    return nullcontext() if name is None else SURROUNDINGS[name]()


@pytest.mark.parametrize(
    "schedule",
    [
        "inject=1,prune=1:4+2:2,selection=dtopk",
        "inject=1,prune=1:4,score=all_text",
        "inject=1,prune=1:4,exit=2,positions=compact",
    ],
)
def test_schedules_compiled_and_trained_inside(schedule: str) -> None:
    found = []
    for around in (None, "with torch.device", "bfloat16"):
        model = tiny_llava("qwen2", num_layers=LAYERS, sliding_window=6)
        inputs = batch(model, ROWS, padding="right")
        labels = random_labels(inputs)
        with surrounded_loosely(around):
            hidrop.compile(model, schedule, backend="eager")
            loss, gradients = step(model.train(), inputs | {"labels": labels})
        found.append((loss, gradients))
    for loss, gradients in found[1:]:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, found[0][0])
        assert_gradients_close(gradients, found[0][1])
