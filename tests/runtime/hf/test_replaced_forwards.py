"""Forwards that other libraries put in the place of a compiled model's: kept, noticed at the call, given back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hidrop_fx as hidrop
from tests.support.models import IMAGE, Make, batch, tiny_llava
from tests.support.prompts import CLOSE, ROWS
from tests.support.ratios import DTOPK, HARD, supervised_batch
from tests.support.reference import reference_logits
from tests.support.runtimes import runtime_in

LAYERS = 3
OTHER = "exit=2"
LOOSE = {"rtol": 0.02, "atol": 0.3}
"""How close logits of a bf16 autocast are, which are of size 10."""


def model_under(schedule: str = HARD) -> Any:
    return hidrop.compile(tiny_llava(num_layers=LAYERS), schedule, backend="eager")


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, **options).logits
    return found


def expected_logits(model: Any, schedule: str, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return reference_logits(model, hidrop.Schedule.parse(schedule), inputs)


# Wrappers that call what they wrap.


def accelerate_in_bf16(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def accelerate_hook(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())


def wrapped_closure(model: Any) -> None:
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = forward


def rebound_function(model: Any) -> None:
    function = model.forward.__func__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def torch_compile(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def transformers_debugger(model: Any) -> None:
    """The outermost wrapper of `transformers.model_addition_debugger_context`."""
    real = model.forward

    @functools.wraps(real)
    def top_wrapped_forward(*inps: Any, **kws: Any) -> Any:
        return real(*inps, **kws)

    model.forward = top_wrapped_forward


WRAPPERS = [
    accelerate_in_bf16,
    accelerate_hook,
    wrapped_closure,
    rebound_function,
    torch_compile,
    transformers_debugger,
]
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)


@each_wrapper
def test_a_wrapper_stays_through_compile_and_restore(
    wrap: Callable[[Any], None], plain: Make
) -> None:
    """A second stage in one process, and a third; what was put around the first stays around each."""
    hf = plain(num_layers=LAYERS)
    inputs = batch(hf, ROWS)
    close = LOOSE if wrap is accelerate_in_bf16 else CLOSE
    model = model_under(HARD)
    wrap(model)
    around = model.forward
    expected = expected_logits(hf, HARD, inputs), expected_logits(hf, OTHER, inputs)
    torch.testing.assert_close(logits(model, inputs), expected[0], **close)
    hidrop.compile(model, OTHER, backend="eager")
    assert model.forward == around
    torch.testing.assert_close(logits(model, inputs), expected[1], **close)
    hidrop.restore(model)
    assert not hidrop.is_compiled(model)
    assert model.forward == around
    torch.testing.assert_close(logits(model, inputs), logits(hf, inputs), **close)
    hidrop.compile(model, HARD, backend="eager")
    assert model.forward == around
    torch.testing.assert_close(logits(model, inputs), expected[0], **close)
    assert not torch.allclose(*expected, rtol=0.1, atol=1.0), "schedules that differ"


def test_mixed_precision_of_accelerate_runs_compiled(plain: Make) -> None:
    """Its wrapper computes in bf16 and returns fp32, and is the innermost of what there is."""
    model = model_under()
    accelerate_in_bf16(model)
    found = logits(model, batch(model, ROWS))
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())


def test_columns_are_gone_from_outputs_that_accelerate_makes_again() -> None:
    model = model_under().train()
    inputs = supervised_batch(model)
    assert model(**inputs).logit_columns is not None
    accelerate_in_bf16(model)
    assert not hasattr(model(**inputs), "logit_columns")


UNWRAPPED = [
    ("compile", "prepare", "unwrap"),
    ("compile", "prepare", "unwrap", "prepare"),
    ("prepare", "compile", "unwrap"),
    ("prepare", "compile", "restore", "unwrap", "compile"),
    ("compile", "prepare", "restore", "unwrap", "compile"),
    ("compile", "prepare", "unwrap", "unwrap"),
]


@pytest.mark.parametrize("steps", UNWRAPPED, ids="-".join)
def test_accelerate_prepares_and_unwraps_in_any_order(steps: tuple[str, ...], plain: Make) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    hf = plain(num_layers=LAYERS)
    model: Any = tiny_llava(num_layers=LAYERS)

    def unwrap() -> None:
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
        model._is_accelerate_prepared = False

    run: dict[str, Callable[[], Any]] = {
        "compile": lambda: hidrop.compile(model, HARD, backend="eager"),
        "restore": lambda: hidrop.restore(model),
        "prepare": lambda: accelerator.prepare(model),
        "unwrap": unwrap,
    }
    for step in steps:
        run[step]()
    inputs = batch(hf, ROWS)
    close = LOOSE if steps[-1] == "prepare" else CLOSE
    torch.testing.assert_close(logits(model, inputs), expected_logits(hf, HARD, inputs), **close)
    hidrop.restore(model)
    torch.testing.assert_close(logits(model, inputs), logits(hf, inputs), **close)
    if steps[-1] == "unwrap":
        assert "_original_forward" not in vars(model)


def test_what_was_there_before_compile_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_llava(num_layers=LAYERS)
    rebound_function(model)
    before = model.forward
    hidrop.compile(model, HARD, backend="eager")
    assert "replaced before, by tests.runtime.hf.test_replaced_forwards.rebound_function" in (
        caplog.text
    )
    hidrop.restore(model)
    assert model.forward == before


# Forwards that call the model without its head, and keep the labels to themselves.


def trl_head(model: Any) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    utils.add_fused_lm_head(model)
    fused = model.forward.__func__

    @functools.wraps(fused)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fused(self, *args, fused_lm_head=True, **kwargs)

    model.forward = MethodType(forward, model)


def liger_head(model: Any) -> None:
    """As `liger_kernel.transformers.model.llava.lce_forward`: labels are a parameter."""

    def lce_forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs, use_cache=False).last_hidden_state
        return loss_of(self.lm_head(hidden), labels)

    model.forward = MethodType(lce_forward, model)


def closed_head(model: Any) -> None:
    """Labels are among the keyword arguments."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels")
        return loss_of(
            model.lm_head(model.model(*args, **kwargs, use_cache=False).last_hidden_state), labels
        )

    model.forward = forward


def loss_of(logits: Tensor, labels: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutput

    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutput(loss=loss)  # type: ignore[arg-type]


HEADS = [trl_head, liger_head, closed_head]
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda f: f.__name__)


def expected_loss(inputs: dict[str, Tensor], schedule: str = HARD) -> Tensor:
    hf = tiny_llava(num_layers=LAYERS)
    with torch.no_grad():
        full = reference_logits(hf, hidrop.Schedule.parse(schedule), inputs)
    found: Tensor = loss_of(full, inputs["labels"]).loss
    return found


@each_head
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_labels_that_a_forward_keeps_to_itself_score(
    head: Callable[[Any], None], training: bool
) -> None:
    """Neither `train` nor `eval` is called again, as on the reference model of DPO."""
    model = model_under().train(training)
    inputs = supervised_batch(model)
    head(model)
    expected = expected_loss(inputs)
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-4, atol=1e-4)
    states = runtime_in(model).call({k: v for k, v in inputs.items() if k != "labels"})
    blind = loss_of(model.lm_head(states.hidden), inputs["labels"]).loss
    assert abs(blind - expected) > 1e-3, "labels matter to this batch"


@each_head
@torch.no_grad()
def test_labels_are_noted_by_position_too_and_after_the_next_compile(
    head: Callable[[Any], None],
) -> None:
    model = model_under(OTHER)
    inputs = supervised_batch(model)
    head(model)
    hidrop.compile(model, HARD, backend="eager")
    ids = inputs.pop("input_ids")
    found = model(ids, **inputs).loss
    torch.testing.assert_close(
        found, expected_loss({"input_ids": ids, **inputs}), rtol=1e-4, atol=1e-4
    )
    hidrop.restore(model)
    hf = tiny_llava(num_layers=LAYERS)
    plain_loss = hf(ids, **inputs).loss
    torch.testing.assert_close(model(ids, **inputs).loss, plain_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [trl_head, liger_head], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_copy_whose_forward_is_replaced_scores_by_its_own_labels(
    head: Callable[[Any], None],
) -> None:
    model = model_under()
    twin = copy.deepcopy(model)
    head(model)
    head(twin)
    later = copy.deepcopy(twin)
    inputs = supervised_batch(model)
    for each in (model, twin, later):
        torch.testing.assert_close(each(**inputs).loss, expected_loss(inputs), rtol=1e-4, atol=1e-4)
    later.lm_head.weight.mul_(2)
    assert later(**inputs).loss != twin(**inputs).loss


@torch.no_grad()
def test_a_forward_called_past_the_model_reads_its_arguments_or_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PEFT's AdaLora calls `model.forward(...)`, not the model."""
    caplog.set_level("INFO", logger="hidrop_fx")
    model = model_under()
    inputs = supervised_batch(model)
    liger_head(model)
    torch.testing.assert_close(
        model.forward(**inputs).loss, expected_loss(inputs), rtol=1e-4, atol=1e-4
    )
    assert "lce_forward and called past the model" in caplog.text
    closed_head(model)
    with pytest.raises(
        hidrop.HidropError, match=r"closed_head.<locals>.forward, which was called past the model"
    ):
        model.forward(**inputs)
    torch.testing.assert_close(model(**inputs).loss, expected_loss(inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_model_without_its_head_needs_no_labels_beside_a_wrapper() -> None:
    """Called by the user, while no forward runs."""
    model = model_under()
    inputs = batch(model, ROWS)
    expected = model.model(**inputs).last_hidden_state
    for wrap in (accelerate_in_bf16, closed_head):
        wrap(model)
        torch.testing.assert_close(model.model(**inputs).last_hidden_state, expected)


def test_a_missing_budget_term_is_said_where_the_labels_are_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="hidrop_fx")
    model = model_under(DTOPK).train()
    inputs = supervised_batch(model)
    accelerate_in_bf16(model)
    model(**inputs)
    assert "budget term" not in caplog.text, "accelerate's forward calls ours"
    liger_head(model)
    model(**inputs).loss.backward()
    assert "budget term" in caplog.text
    assert model.hidrop_ratios.values.grad is not None


# A forward that is gone.


def deleted(model: Any) -> None:
    del model.forward


def bound_again(model: Any) -> None:
    model.forward = MethodType(type(model).forward, model)


def hook_removed(model: Any) -> None:
    """A hook of accelerate that was there before compile gives back what was there before it."""
    model._old_forward = MethodType(type(model).forward, model)
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hooks.remove_hook_from_module(model)


@pytest.mark.parametrize("take", [deleted, bound_again, hook_removed])
def test_the_class_s_own_forward_gives_way_again(
    take: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_under()
    inputs = batch(model, ROWS)
    expected = logits(model, inputs)
    take(model)
    assert torch.equal(logits(model, inputs), expected)
    assert "set back to its class's own after hidrop.compile" in caplog.text
    hidrop.restore(model)
    assert "forward" not in vars(model)


@torch.no_grad()
def test_a_replaced_base_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = model_under()
    inputs = supervised_batch(model)
    expected = logits(model, inputs)
    del model.model.forward
    liger_head(model)
    torch.testing.assert_close(model(**inputs).loss, expected_loss(inputs), rtol=1e-4, atol=1e-4)
    model.model = copy.deepcopy(model.model)
    torch.testing.assert_close(model(**inputs).loss, expected_loss(inputs), rtol=1e-4, atol=1e-4)
    assert model.model.forward.__self__ is model.model
    del model.forward
    rebound_function(model.model)
    assert torch.equal(logits(model, inputs), expected)
    assert "rebound_function.<locals>.forward: it does not run in model(...)" in caplog.text
    hidrop.restore(model)
    hf = tiny_llava(num_layers=LAYERS)
    assert torch.equal(logits(model, inputs), logits(hf, inputs))


def test_a_patched_class_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_llava(num_layers=LAYERS)
    original = type(model).forward

    def lce_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", lce_forward)
    hidrop.compile(model, HARD, backend="eager")
    assert "lce_forward; the compiled one takes its place" in caplog.text


def test_generate_hands_no_argument_of_its_own_to_a_forward_that_takes_none() -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "exit=1", backend="eager")
    inputs = batch(model, [[5, IMAGE, 7]])
    options = {"max_new_tokens": 3, "do_sample": False}
    expected, inner = model.generate(**inputs, **options), model.forward

    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        pixel_values: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        return_dict: Any = None,
        mm_encoder_outputs: Any = None,
    ) -> Any:
        return inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=return_dict,
            mm_encoder_outputs=mm_encoder_outputs,
        )

    model.forward = forward
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("of", ["model", "forward", "base", "parent"])
def test_torch_compile_around_a_compiled_model_traces_none_of_it(of: str, plain: Make) -> None:
    """It would guard on our own bookkeeping, on models that are collected meanwhile for one."""
    traced = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    class Parent(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    hf, model = plain(num_layers=LAYERS), model_under()
    around: Any = {
        "model": model,
        "forward": model.forward,
        "base": model.model,
        "parent": Parent(model),
    }[of]
    inputs = batch(hf, ROWS)
    compiled = torch.compile(around, backend=record)
    with torch.no_grad():
        output = compiled(**inputs)
        found = output.logits if of != "base" else model.lm_head(output.last_hidden_state)
    torch.testing.assert_close(found, expected_logits(hf, HARD, inputs), **CLOSE)
    assert not traced
    with pytest.raises(Exception, match="programs that are compiled already"):
        torch.compile(around, backend=record, fullgraph=True)(**inputs)
