"""Programs whose layers run inside calls of the decoder's own modules, on a decoder that nothing shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import hidrop_fx as hidrop
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.outline import lower
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.run import execute
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.runtimes import runtime_in

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 10, 11, 12, 13]]
SCHEDULES = (PRUNED, "fastv", "inject=0", "inject=1,prune=1:6+2:3,selection=dtopk,exit=3")


def prepared(model: Any, kind: str) -> PreparedCall:
    inputs: dict[str, Any] = dict(batch(model, ROWS, padding="left"))
    runtime = runtime_in(model)
    if kind == "train":
        return runtime.prepare({**inputs, "use_cache": False})
    inputs["past_key_values"] = HidropCache(max_length=30)
    first = runtime.prepare(inputs)
    if kind == "prefill":
        return first
    execute(first, None)
    cache = model(**batch(model, ROWS, padding="left"), use_cache=True).past_key_values
    return runtime.prepare({"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache})


def calling_modules(model: Any, call: PreparedCall) -> PreparedCall:
    """Lower the program of a call anew, so that it calls the decoder's modules."""
    program = call.executable.program
    made = lower(
        program,
        backend="eager",
        lowering="bodies",
        log=CompileLog(),
        shared={},
        decoder=model.get_decoder(),
    )
    return replace(call, executable=made)


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request: pytest.FixtureRequest) -> Any:
    return hidrop.compile(tiny_llava(), request.param, backend="eager")


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_each_layer_and_the_norm_are_called_once_and_compute_the_same(
    model: Any, kind: str
) -> None:
    decoder = model.get_decoder()
    with torch.no_grad():
        call = prepared(model, kind)
        expected = {name: value.clone() for name, value in execute(call, None).items()}
        again = calling_modules(model, call)
        calls: Counter[str] = Counter()
        called = {f"layers.{k}": layer for k, layer in enumerate(decoder.layers)}
        called["norm"] = decoder.norm
        handles = [
            module.register_forward_pre_hook(lambda m, args, name=name: calls.update([name]))
            for name, module in called.items()
        ]
        found = execute(again, None)
    for handle in handles:
        handle.remove()
    assert calls == dict.fromkeys(called, 1)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert not any("forward" in module.__dict__ for module in called.values())
    left = [n for n in again.executable.top.graph.nodes if n.op == "get_attr"]
    assert not any(
        isinstance(getattr(again.executable.top, str(n.target), None), nn.Parameter) for n in left
    )


def test_parameters_are_those_that_a_hook_puts_there(model: Any) -> None:
    """As an engine does that gathers them; behind the call they are out of reach again."""
    layer = model.get_decoder().layers[1]
    with torch.no_grad():
        call = calling_modules(model, prepared(model, "train"))
        before = execute(call, None)["hidden"]
        weights = layer.mlp.up_proj._parameters
        own = weights["weight"]
        own.mul_(2)
        expected = execute(call, None)["hidden"]
        own.div_(2)

        def gather(*_: Any) -> None:
            weights["weight"] = nn.Parameter(own * 2)

        def release(*_: Any) -> None:
            weights["weight"] = own

        handles = layer.register_forward_pre_hook(gather), layer.register_forward_hook(release)
        found = execute(call, None)["hidden"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, before)


def test_an_error_inside_leaves_the_module_as_it_was(model: Any) -> None:
    layer = model.get_decoder().layers[2]

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with torch.no_grad():
        call = calling_modules(model, prepared(model, "train"))
        handle = layer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            execute(call, None)
        handle.remove()
    assert "forward" not in layer.__dict__


def test_values_of_another_dtype_are_handed_past_the_hooks() -> None:
    """A hook that rounds what a layer is called with must not round learned ratios, scores or counts."""
    made = tiny_llava(dtype=torch.bfloat16)
    model = hidrop.compile(made, SCHEDULES[-1], backend="eager").train()
    layer = model.get_decoder().layers[2]
    seen: list[Any] = []
    with torch.no_grad():
        call = calling_modules(model, prepared(model, "train"))
        handle = layer.register_forward_pre_hook(lambda m, args: seen.extend(args))
        execute(call, None)
        handle.remove()
    assert {value.dtype for value in seen} == {torch.bfloat16}
    dtypes = {v.dtype for v in call.tensors.values() if v.is_floating_point()}
    assert torch.float32 in dtypes, "the ratio, which layer 2 reads"


def test_hooks_of_wrapped_layers_and_of_their_wrappers_run_once() -> None:
    model: Any = hidrop.compile(tiny_llava(), PRUNED, backend="eager")
    layers = model.get_decoder().layers
    for k, layer in enumerate(layers):
        layers[k] = checkpoint_wrapper(layer)
    call = prepared(model, "prefill")
    expected = call.executable(call.tensors)
    calls: Counter[str] = Counter()
    made = calling_modules(model, call).executable
    for module in (layers[2], layers[2]._checkpoint_wrapped_module):
        name = type(module).__name__
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    found = made(call.tensors)
    assert calls == {"CheckpointWrapper": 1, "LlamaDecoderLayer": 1}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not any("forward" in vars(module) for module in layers.modules())
