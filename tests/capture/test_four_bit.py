"""4-bit layers of bitsandbytes: one node each, whose code is bitsandbytes' own; LoRA around them trains as in Hugging Face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hidrop_fx as hidrop
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.reference import reference_generate, reference_logits
from tests.support.runtimes import runtime_in

ROWS = [[5, 6, IMAGE, 7], [8, 9, 10]]
WIDTH = 128
"""A multiple of bitsandbytes' blocks of 64."""


def bitsandbytes() -> Any:
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes, an optional dependency, is not installed"
    )


def packed(compute: torch.dtype | None = None, **options: Any) -> Any:
    """Return a tiny model whose text decoder's linear layers are packed in 4 bits, as `load_in_4bit` has them."""
    kind = bitsandbytes().nn.Linear4bit
    given = {"bias": False, "quant_type": "nf4", "compute_dtype": compute}
    model: Any = tiny_llava(hidden_size=WIDTH, **options)
    for module in list(model.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                layer = kind(child.in_features, child.out_features, **given)
                layer.load_state_dict(child.state_dict())
                # Else evaluation on a CPU with AVX512-BF16 rounds activations, and needs wider layers.
                layer.support_avx512bf16_for_cpu = False
                setattr(module, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def supervised() -> dict[str, Tensor]:
    inputs = batch(tiny_llava(num_layers=1), ROWS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return inputs | {"labels": labels}


@torch.no_grad()
def test_packed_layers_give_what_they_give_in_hugging_face() -> None:
    hf, model = packed(), packed()
    inputs = batch(hf, ROWS)
    layer = model.model.language_model.layers[0].mlp.up_proj
    hidrop.compile(model, "identity", backend="eager")
    found = model(**inputs).logits
    assert "forward" not in layer.__dict__, "the trace leaves layers as they were"
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], hf(**inputs).logits[real], rtol=1e-5, atol=1e-5)
    rounded = (found - tiny_llava(hidden_size=WIDTH)(**inputs).logits)[real].abs().max()
    assert rounded > 0.01, "weights are rounded"


@torch.no_grad()
def test_packed_layers_follow_a_schedule() -> None:
    model = packed()
    inputs, schedule = batch(model, ROWS), hidrop.Schedule.parse(PRUNED)
    expected = reference_logits(model, schedule, inputs)
    answers = reference_generate(model, schedule, inputs, 4)
    hidrop.compile(model, schedule, backend="eager")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found[:, -4:].tolist() == answers


@pytest.mark.parametrize("schedule", ["identity", PRUNED])
def test_adapters_on_packed_layers_train_as_in_hugging_face(schedule: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    inputs, steps = supervised(), []
    for compiled in (True, False):
        model = packed()
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).train()
        projection = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
        assert type(projection) is peft.tuners.lora.Linear4bit
        trained = [p for p in model.parameters() if p.requires_grad]
        if compiled:
            hidrop.compile(model, schedule, backend="eager")
            loss = model(**inputs).loss
        elif schedule == "identity":
            loss = model(**inputs).loss
        else:
            given = hidrop.Schedule.parse(schedule)
            logits = reference_logits(model.get_base_model(), given, inputs)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
        loss.backward()
        steps.append((loss.detach(), [p.grad for p in trained]))
    (loss, grads), (expected, wanted) = steps
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for found, grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-5)
    assert max(float(grad.abs().max()) for grad in wanted) > 1e-3


def test_a_model_prepared_for_training_takes_hugging_face_s_step() -> None:
    """bf16 products between fp32 norms, and layers that compute their activations again."""
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    inputs, steps = supervised(), []
    for compiled in (True, False):
        model = packed(torch.bfloat16, dtype=torch.bfloat16)
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).train()
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        loss = model(**inputs).loss
        loss.backward()
        steps.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
    assert max(float(grad.abs().max()) for grad in steps[1][1]) > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_packed_layers_under_inductor_equal_hugging_face() -> None:
    hf, model = packed(), packed()
    inputs = batch(hf, ROWS)
    hidrop.compile(model, "identity", backend="inductor")
    real = inputs["attention_mask"].bool()
    found = model(**inputs).logits[real]
    torch.testing.assert_close(found, hf(**inputs).logits[real], rtol=1e-4, atol=1e-4)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected = hf.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)
    assert runtime_in(model).programs.log.fallbacks == []
