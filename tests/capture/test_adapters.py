"""Every tuner of PEFT for linear layers: captured, it computes what Hugging Face computes, or it is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx.capture.admission import check_capturable
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import IMAGE, batch, random_labels, tiny_llava

peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")

LINEAR = r".*language_model.*(q_proj|down_proj)"
ROWS = [[5, 6, IMAGE, 7, 8], [9, 10, 11, 12]]

Config = Callable[[], Any]

KASA, VELORA, MONTECLORA = (
    peft.tuners.lora.config.KasaConfig(),
    peft.tuners.lora.config.VeloraConfig(num_groups=4),
    peft.tuners.lora.config.MontecloraConfig(),
)


def _lora(**options: Any) -> Config:
    given: dict[str, Any] = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False}
    return lambda: peft.LoraConfig(**given | options)


def _tuner(name: str, **options: Any) -> Config:
    given: dict[str, Any] = {"target_modules": LINEAR, "init_weights": False}
    return lambda: getattr(peft, f"{name}Config")(**given | options)


FOLLOWED: dict[str, Config] = {
    "lora": _lora(),
    "lora: rslora, bias": _lora(use_rslora=True, lora_bias=True),
    "lora: dora": _lora(use_dora=True),
    "lora: qalora": _lora(use_qalora=True, qalora_group_size=8),
    "lora: kasa": _lora(init_lora_weights=True, kasa_config=KASA),
    "lora: mica": _lora(init_lora_weights="mica"),
    "lora: of parameters": _lora(target_modules=[], target_parameters=["up_proj.weight"]),
    "lora: modules to save": _lora(modules_to_save=["o_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=LINEAR
    ),
    "beft": _tuner("Beft"),
    "boft": _tuner("BOFT", boft_block_size=4),
    "deft": _tuner("Deft", r=4),
    "delora": _tuner("Delora", r=4),
    "fourierft": _tuner("FourierFT", n_frequency=20),
    "glora": _tuner("Glora", r=4),
    "gralora": _tuner("Gralora", r=4, gralora_k=2),
    "hira": _tuner("Hira", r=4),
    "hra": _tuner("HRA", r=4),
    "ia3": lambda: peft.IA3Config(
        target_modules=LINEAR, feedforward_modules=r".*down_proj", init_ia3_weights=False
    ),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=r".*language_model.*layernorm"),
    "loha": _tuner("LoHa", r=4),
    "lokr": _tuner("LoKr", r=4),
    "miss": _tuner("Miss", r=4),
    "oft": _tuner("OFT", oft_block_size=4, use_cayley_neumann=False),
    "oft: cayley-neumann": _tuner("OFT", oft_block_size=4, use_cayley_neumann=True),
    "osf": lambda: peft.OSFConfig(target_modules=["q_proj", "down_proj"], effective_rank=8),
    "peanut": _tuner("Peanut", r=4),
    "pvera": _tuner("Pvera", r=4),
    "psoft": _tuner("Psoft", r=4),
    "randlora": _tuner("RandLora", r=4),
    "road": _tuner("Road", group_size=8),
    "supertuning": _tuner("Supertuning", sparsity=0.9),
    "tinylora": _tuner("TinyLora", r=2, u=8),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(
        target_modules=r".*embed_tokens", token_indices=[5, 6]
    ),
    "unilora": _tuner("UniLora", r=4, theta_d_length=64),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=8, topk=2, target_modules=LINEAR
    ),
    "vera": _tuner("Vera", r=4),
    "waveft": _tuner("WaveFT", n_frequency=20),
}
NOISY = ("pvera",)
"""Draw noise in training."""
IN_EVALUATION = {
    "c3a": (_tuner("C3A", block_size=8), "BlockCircularConvolution.*backward of its own"),
}
"""Followed in evaluation, refused where gradients are enabled."""
REFUSED = {
    "lora: alora": (
        _lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "activated LoRA",
    ),
    "frod": (_tuner("Frod", sparse_rate=0.3, progressbar=False), "FRoD .*sparse"),
    "lily": (_tuner("Lily", r=4, num_B=2, stride_A=1), "Lily .*mean over all tokens"),
    "poly": (_tuner("Poly", r=4, n_tasks=2, n_skills=2), "Poly .*task_ids"),
    "shira": (_tuner("Shira", r=4), "SHiRA .*sparse"),
}
NOT_FOR_LINEAR = {
    # parts of the prompt, or of the cache, which PEFT puts in around the model
    *("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge"),
    "adaption_prompt",  # PEFT has none for llava
    "mixed",  # several of the others
    *("xlora", "shadow"),  # PEFT makes none around a vision-language model
    "adamss",  # needs scikit-learn
}


def adapted(make: Config, *, train: bool = False) -> Any:
    """Return a model of one layer with an adapter whose weights are no zeros."""
    model = tiny_llava("llama", num_layers=1)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, make())
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return wrapped.train(train)


def pair(make: Config, *, train: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """Return a compiled model, the same of Hugging Face, and a batch for both."""
    theirs, ours = adapted(make, train=train), adapted(make, train=train)
    ours.load_state_dict(theirs.state_dict())
    inputs = batch(ours.get_base_model(), ROWS, padding="right")
    if train:
        inputs["labels"] = random_labels(inputs, seed=1)
    return hidrop.compile(ours, "identity", backend="eager"), theirs, inputs


def test_the_table_has_every_tuner() -> None:
    from peft.utils import PeftType

    known = {name.partition(":")[0] for name in (*FOLLOWED, *IN_EVALUATION, *REFUSED)}
    assert known | NOT_FOR_LINEAR >= {kind.value.lower() for kind in PeftType}


QUICK = ("lora: dora", "hra", "vera")


def _marked(names: Any) -> list[Any]:
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@torch.no_grad()
@pytest.mark.parametrize("name", _marked((*FOLLOWED, *IN_EVALUATION)))
def test_answers_are_those_of_hugging_face(name: str) -> None:
    make = FOLLOWED[name] if name in FOLLOWED else IN_EVALUATION[name][0]
    ours, theirs, inputs = pair(make)
    valid = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[valid]
    without = tiny_llava("llama", num_layers=1)(**inputs).logits[valid]
    assert (expected - without).abs().max() > 0.005, "the adapter does nothing"
    torch.testing.assert_close(ours(**inputs).logits[valid], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", _marked(FOLLOWED))
def test_gradients_are_those_of_hugging_face(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NOISY:  # of which ours draws for its own order of tokens
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    ours, theirs, inputs = pair(FOLLOWED[name], train=True)
    loss, found = step(ours, inputs)
    expected_loss, expected = step(theirs, inputs)
    torch.testing.assert_close(loss, expected_loss)
    assert expected
    assert_gradients_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_anew_at_every_step(name: str) -> None:
    ours, _, inputs = pair(FOLLOWED[name], train=True)
    losses = [float(step(ours, inputs)[0]) for _ in range(3)]
    assert len(set(losses)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_EVALUATION)
def test_a_backward_of_ones_own_is_refused_where_gradients_are_enabled(name: str) -> None:
    make, message = IN_EVALUATION[name]
    ours, _, inputs = pair(make, train=True)
    with pytest.raises(hidrop.CaptureError, match=message):
        ours(**inputs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_captured_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = adapted(make)
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.compile(model, "identity", backend="eager")
    assert not hidrop.is_compiled(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_tuner("LoHa", r=4, module_dropout=0.5), "branch"),
        (_tuner("LoKr", r=4, rank_dropout=0.5), "branch"),
        (_lora(velora_config=VELORA), "VeLoRA .*other gradients"),
        (_lora(monteclora_config=MONTECLORA), "MonteCLoRA .*samples"),
    ],
)
def test_what_trains_in_another_way_is_refused_in_training_alone(
    make: Config, message: str
) -> None:
    decoder = adapted(make).get_base_model().get_decoder()
    check_capturable(decoder, decoder)
    decoder.train()
    with pytest.raises(hidrop.UnsupportedModelError, match=message):
        check_capturable(decoder, decoder)


def test_adapters_by_row_are_refused_by_name() -> None:
    model = adapted(_lora())
    model.add_adapter("other", _lora()())
    hidrop.compile(model, "identity", backend="eager")
    inputs = batch(model.get_base_model(), ROWS)
    with torch.no_grad(), pytest.raises(hidrop.UnsupportedModelError, match="adapter_names"):
        model(**inputs, adapter_names=["default", "other"])


class Own(nn.Module):
    """A layer that decides by a value, or mixes tokens, or ends gradients."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x: Any) -> Any:
        if self.what == "value" and x.abs().max() > 3:
            return x
        if self.what == "tokens":
            return self.inner(x) + x.mean(dim=1, keepdim=True)
        if self.what == "no_grad":
            with torch.no_grad():
                return self.inner(x)
        if self.what == "backward":
            return Straight.apply(self.inner(x))
        return self.inner(x)


class Straight(torch.autograd.Function):
    """Rounding, whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad


@pytest.mark.parametrize(
    ("what", "train", "message"),
    [
        ("value", False, r"at layers\.0\.mlp \(.*Own\): .*by the value of a tensor"),
        ("tokens", False, r"layers\.0\.mlp .*Own.* computes one value of several tokens"),
        ("no_grad", True, r"layers\.0\.mlp.*Own.* computes under torch\.no_grad"),
        ("backward", True, r"layers\.0\.mlp.*Own.* calls Straight"),
    ],
)
def test_code_of_ones_own_that_no_graph_holds_is_named(
    what: str, train: bool, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_llava("llama", num_layers=1)
    decoder = model.get_decoder()
    decoder.layers[0].mlp = Own(decoder.layers[0].mlp, what)
    hidrop.compile(model.train(train), "identity", backend="eager")
    inputs = batch(model, ROWS, padding="right")
    if train:
        with torch.no_grad(), caplog.at_level(logging.INFO, "hidrop_fx"):
            model(**inputs)  # an answer is what it is
        inputs["labels"] = random_labels(inputs, seed=1)
    with torch.set_grad_enabled(train), pytest.raises(hidrop.CaptureError, match=message):
        model(**inputs)
