"""A model that is changed after its first call answers as Hugging Face's does after the same change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.models import IMAGE, batch, tiny_llava

ROWS = [[5, 6, IMAGE, 7, 8]]

Change = Callable[[Any], Any]

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(autouse=True)
def _classes_stay_as_they_are() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (modeling_llama.LlamaRMSNorm, "forward"),
            (modeling_llama, "rotate_half"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        yield


def pair(change: Change) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return a compiled model that was called and then changed, the same of Hugging Face, and a prompt."""
    ours: Any = tiny_llava("llama", num_layers=2)
    theirs: Any = tiny_llava("llama", num_layers=2)
    hidrop.compile(ours, "identity", backend="eager")
    inputs = batch(ours, ROWS)
    before = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, before, atol=5e-5, rtol=1e-4)
    change(ours)
    change(theirs)
    assert (theirs(**inputs).logits - before).abs().max() > 0.1
    return ours, theirs, inputs


def halve(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args) * 0.5


def replace_forward(model: Any) -> None:
    mlp = model.get_decoder().layers[1].mlp
    mlp.forward = halve(mlp.forward)


def replace_class_forward(_: Any) -> None:
    if not hasattr(modeling_llama.LlamaRMSNorm.forward, "__closure__") or (
        modeling_llama.LlamaRMSNorm.forward.__name__ == "forward"
    ):
        modeling_llama.LlamaRMSNorm.forward = halve(modeling_llama.LlamaRMSNorm.forward)


def replace_function(_: Any) -> None:
    if modeling_llama.rotate_half.__name__ == "rotate_half":
        modeling_llama.rotate_half = halve(modeling_llama.rotate_half)


def weight_norm(model: Any) -> None:
    proj = model.get_decoder().layers[0].mlp.up_proj
    nn.utils.parametrizations.weight_norm(proj)
    proj.parametrizations.weight.original0.data *= 2


def spectral_norm(model: Any) -> None:
    proj = model.get_decoder().layers[0].mlp.up_proj
    torch.manual_seed(0)
    nn.utils.parametrizations.spectral_norm(proj)


def accelerate_hook(model: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    hooks.add_hook_to_module(model.get_decoder().layers[0].mlp, Doubling())


@pytest.mark.parametrize(
    "change",
    [
        replace_forward,
        replace_class_forward,
        replace_function,
        weight_norm,
        spectral_norm,
        accelerate_hook,
        lambda m: m.get_decoder().layers[0].mlp.register_forward_hook(lambda *a: a[2] * 2),
    ],
)
def test_a_change_behind_the_first_call_is_followed(
    change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        ours, theirs, inputs = pair(change)
        expected = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, atol=5e-5, rtol=1e-4)
    assert "the model changed since it was captured (" in caplog.text
    with counter.expect(captures=0, programs=0):
        ours(**inputs)


def test_fewer_layers_are_refused_until_the_model_is_compiled_anew() -> None:
    ours, theirs, inputs = pair(lambda m: setattr(m.config.text_config, "num_hidden_layers", 1))
    with pytest.raises(hidrop.CaptureError, match=r"num_hidden_layers is 1.*hidrop\.compile"):
        ours(**inputs)
    ours.get_decoder().layers = ours.get_decoder().layers[:1]
    with pytest.raises(hidrop.ScheduleError, match="compiled with 2 layers and has 1 now"):
        ours(**inputs)
    hidrop.compile(ours, "identity", backend="eager")
    expected = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, atol=5e-5, rtol=1e-4)


def test_a_wrapper_is_followed_through_its_closure_and_known_again() -> None:
    strength = {"scale": 1.5}

    def steer(model: Any) -> None:
        layer = model.get_decoder().layers[1].mlp
        inner = layer.forward
        layer.forward = lambda x: inner(x) * strength["scale"]

    ours, theirs, inputs = pair(steer)
    for scale, captures in ((1.5, 1), (-1.0, 1), (1.5, 0), (-1.0, 0)):
        strength["scale"] = scale
        with counter.expect(captures=captures):
            found = ours(**inputs).logits
        torch.testing.assert_close(found, theirs(**inputs).logits, atol=5e-5, rtol=1e-4)


def test_a_change_between_prompt_and_answer_is_followed() -> None:
    ours: Any = tiny_llava("llama", num_layers=2)
    theirs: Any = tiny_llava("llama", num_layers=2)
    hidrop.compile(ours, "identity", backend="eager")
    inputs = batch(ours, ROWS)
    caches = [model(**inputs, use_cache=True).past_key_values for model in (ours, theirs)]
    found = []
    for model, cache in zip((ours, theirs), caches, strict=True):
        replace_forward(model)
        step = model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)
        found.append(step.logits)
    torch.testing.assert_close(found[0], found[1], atol=5e-5, rtol=1e-4)


def test_what_the_code_writes_itself_is_said_once_and_captures_nothing_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = tiny_llava("llama", num_layers=1)
    seen: list[str] = []
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: seen.append("called"))
    hidrop.compile(model, "identity", backend="eager")
    inputs = batch(model, ROWS)
    model(**inputs)
    with counter.expect(captures=0):
        model(**inputs)
    written = [line for line in caplog.messages if "code writes" in line]
    assert len(written) == 1
    assert "layers.0.mlp._forward_hooks.seen" in written[0]
