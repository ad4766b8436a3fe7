"""A cache that goes on after the model has changed: new tokens are those of the model as it is now, as in transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.programs import Programs
from tests.support import counter
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.prompts import CLOSE

ROWS = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 11, 12, 13]]
NEXT = torch.tensor([[20], [21]])


def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
    )
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_llava(num_layers=1), config).eval()


def layer(model: Any) -> Any:
    return model.get_decoder().layers[0]


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


def stepped(model: Any) -> None:
    for parameter in model.get_decoder().parameters():
        parameter.mul_(1.1)


CHANGES: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "adapters off": (True, lambda m: m.base_model.disable_adapter_layers()),
    "adapters merged": (True, lambda m: m.merge_adapter()),
    "adapters scaled": (True, scaled),
    "adapters merged and gone": (True, lambda m: m.merge_and_unload()),
    "another module": (False, lambda m: setattr(layer(m).mlp, "act_fn", nn.ReLU())),
    "another attribute": (False, lambda m: setattr(layer(m).self_attn, "scaling", 0.9)),
    "another weight": (
        False,
        lambda m: setattr(
            layer(m).self_attn.o_proj,
            "weight",
            nn.Parameter(layer(m).self_attn.o_proj.weight.flip(0)),
        ),
    ),
    "a step of training": (False, stepped),
    "train mode": (False, lambda m: m.train()),
}


@pytest.mark.parametrize(
    ("name", "graphs"),
    [*((name, False) for name in CHANGES), ("adapters merged", True), ("another module", True)],
)
@torch.no_grad()
def test_the_next_token_is_that_of_the_changed_model(name: str, graphs: bool) -> None:
    with_adapters, change = CHANGES[name]
    found = []
    for compiled in (True, False):
        model = adapted() if with_adapters else tiny_llava(num_layers=1)
        if compiled:
            hidrop.compile(model, "identity", backend="eager", cuda_graphs=graphs)
        inputs = batch(model, ROWS)
        cache = model(**inputs).past_key_values
        logits = [model(input_ids=NEXT, past_key_values=cache).logits]
        change(model)
        logits += [model(input_ids=NEXT, past_key_values=cache).logits for _ in range(2)]
        found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@torch.no_grad()
def test_a_second_turn_without_the_adapter_is_that_of_the_model_without_it() -> None:
    answers = []
    for compiled in (True, False):
        model = adapted()
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        inputs = batch(model, [ROWS[0]])
        options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, NEXT[:1]], dim=1)
        given = {"attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        with model.disable_adapter():
            answers.append(model.generate(input_ids=ids, **given, **options).tolist())
    assert answers[0] == answers[1]


def test_generate_looks_at_the_model_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every token, which the look would slow down."""
    model: Any = hidrop.compile(tiny_llava(num_layers=1), "identity", backend="eager")
    looks, capture = [], Programs.capture

    def counted(programs: Programs) -> Any:
        looks.append(programs)
        return capture(programs)

    monkeypatch.setattr(Programs, "capture", counted)
    for count in (3, 7):
        looks.clear()
        model.generate(**batch(model, ROWS), max_new_tokens=count, do_sample=False)
        assert len(looks) == 2, "with the prompt, and with the first token behind it"


@torch.no_grad()
def test_a_cache_goes_on_with_a_state_that_was_captured_before() -> None:
    model = hidrop.compile(adapted(), "prune=0:6", backend="eager")
    cache = model(**batch(model, ROWS)).past_key_values
    twin = copy.deepcopy(cache)
    on = model(input_ids=NEXT, past_key_values=cache).logits
    with model.disable_adapter():
        model(input_ids=NEXT, past_key_values=copy.deepcopy(twin))
    with counter.expect(captures=0, programs=0):
        with model.disable_adapter():
            off = model(input_ids=NEXT, past_key_values=copy.deepcopy(twin)).logits
        again = model(input_ids=NEXT, past_key_values=twin).logits
    assert torch.equal(on, again)
    assert not torch.allclose(on, off, atol=0.1)


@torch.no_grad()
def test_a_cache_of_another_dtype_is_refused() -> None:
    model: Any = hidrop.compile(tiny_llava(num_layers=1), "identity", backend="eager")
    cache = model(**batch(model, ROWS)).past_key_values
    before = cache.get_seq_length()
    model.double()
    with pytest.raises(hidrop.CacheError, match=r"before the model changed; pass the whole text"):
        model(input_ids=NEXT, past_key_values=cache)
    assert cache.get_seq_length() == before
    model.float()
    assert model(input_ids=NEXT, past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_an_empty_cache_of_ours_is_refused_by_a_plain_model() -> None:
    model = tiny_llava(num_layers=1)
    with pytest.raises(hidrop.CacheError, match=r"cannot serve another model's layers"):
        model(**batch(model, ROWS), past_key_values=HidropCache())
