"""torch's wrappers around decoder layers: the same numbers, and the recomputation that they are there for."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)

import hidrop_fx as hidrop
from hidrop_fx.lowering import checkpointing
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import IMAGE, batch, tiny_llava

SCHEDULE = "inject=1,prune=1:6"
ROWS = [[5, IMAGE, 6, 7, 8], [9, 10, IMAGE, 11, 12]]


def wrap_layers(model: Any) -> None:
    layer = type(model.get_decoder().layers[0])
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, layer))


def wrap_one(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[1] = checkpoint_wrapper(layers[1])


def wrap_parts(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)


def wrap_twice(model: Any) -> None:
    layers = model.get_decoder().layers
    for k, layer in enumerate(layers):
        layers[k] = offload_wrapper(checkpoint_wrapper(layer, preserve_rng_state=False))


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    own = checkpointing.checkpoint

    def counted(run: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(run)
        return own(run, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    return found


def inputs_of(model: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = batch(model, ROWS, padding="left")  # type: ignore[arg-type]
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return inputs | {"labels": labels}


@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        (wrap_layers, "called"),
        pytest.param(wrap_twice, "wrapped", marks=pytest.mark.slow),
        pytest.param(wrap_one, "compiled", marks=pytest.mark.slow),
        pytest.param(wrap_parts, "wrapped", marks=pytest.mark.slow),
    ],
)
def test_a_wrapped_decoder_trains_as_without_wrappers_and_recomputes(
    wrap: Any, first: str, recomputed: list[Any]
) -> None:
    expected: Any = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager").train()
    wanted_loss, wanted = step(expected, inputs_of(expected))
    assert recomputed == []
    model: Any = tiny_llava(num_layers=2).train()
    names = list(model.state_dict())
    if first == "wrapped":
        wrap(model)
    hidrop.compile(model, SCHEDULE, backend="eager")
    if first == "called":
        step(model, inputs_of(model))
    if first != "wrapped":
        wrap(model)
    loss, found = step(model, inputs_of(model))
    assert len(recomputed) == 2
    torch.testing.assert_close(loss, wanted_loss)
    inner = "_checkpoint_wrapped_module."
    assert_gradients_close({n.replace(inner, ""): g for n, g in found.items()}, wanted)
    assert list(model.state_dict()) == names
    hidrop.restore(model)
    kinds = {type(module).__name__ for module in model.get_decoder().modules()}
    assert "CheckpointWrapper" in kinds, "capture put them back"


def test_moving_activations_is_said_to_be_left_off(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_llava(num_layers=2)
    wrap_twice(model)
    hidrop.compile(model, SCHEDULE, backend="eager")
    with caplog.at_level(logging.INFO, logger="hidrop_fx"), torch.no_grad():
        model(**inputs_of(model))
    assert sum("keeps their activations on the device" in line for line in caplog.messages) == 1
