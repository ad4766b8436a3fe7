"""Calls with a cache that holds a prompt, and models that change under a compiled forward."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.models import EOS, IMAGE, PRUNED, Make, batch, tiny_llava
from tests.support.runtimes import runtime_in

ROWS = [[5, 6, IMAGE, 7, 8], [9, 10, IMAGE, 11, 12]]


@torch.no_grad()
def prefill(model: Any, rows: Any = ROWS) -> tuple[dict[str, Tensor], Any]:
    inputs = batch(model, rows)
    mask = torch.ones_like(inputs["input_ids"])
    return inputs, model(**inputs | {"attention_mask": mask}).past_key_values


def compiled_and_plain(compiled: Make, plain: Make) -> tuple[Any, Any]:
    return compiled("llama", "identity"), plain("llama")


@torch.no_grad()
def second_turn(model: Any, first: Any, mask: Tensor, new: Tensor) -> Tensor:
    ids = torch.cat([first.sequences, new], dim=1)
    mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
    )
    return output[:, ids.shape[1] :]


def test_tokens_after_an_eos_are_hidden_in_the_next_turn(compiled: Make, plain: Make) -> None:
    results = []
    for model in compiled_and_plain(compiled, plain):
        inputs = batch(model, ROWS)
        length = inputs["input_ids"].shape[1]
        free = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        eos = int(free[0, length + 1])
        first = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        ended = (first.sequences[:, length:] == eos).cumsum(dim=1).bool()
        assert ended[0, 2]
        assert not ended[1].all()
        mask = torch.ones_like(first.sequences)
        mask[:, length + 1 :] = (~ended[:, :-1]).long()
        results.append(second_turn(model, first, mask, torch.tensor([[20, 21], [22, 23]])))
    assert results[0].tolist() == results[1].tolist()


@torch.no_grad()
def test_one_new_token_that_is_padding_is_hidden_afterwards(compiled: Make, plain: Make) -> None:
    logits = []
    for model in compiled_and_plain(compiled, plain):
        inputs, cache = prefill(model)
        mask = torch.ones_like(inputs["input_ids"])
        mask = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
        ids = mask.cumsum(dim=1) - 1
        model(
            input_ids=torch.tensor([[20], [0]]),
            attention_mask=mask,
            position_ids=ids[:, -1:] if model is plain("llama") else None,
            past_key_values=cache,
        )
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        ids = mask.cumsum(dim=1) - 1
        output = model(
            input_ids=torch.tensor([[21], [22]]),
            attention_mask=mask,
            position_ids=ids[:, -1:] if model is plain("llama") else None,
            past_key_values=cache,
        )
        logits.append(output.logits)
    torch.testing.assert_close(*logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 1, 20), torch.ones(2, 3, dtype=torch.long)], ids=["4-D", "short"]
)
def test_a_mask_of_another_shape_is_refused(compiled: Make, mask: Tensor) -> None:
    model = compiled()
    _, cache = prefill(model)
    before = cache.get_seq_length()
    with pytest.raises(hidrop.InputError, match=r"attention_mask has shape .*past and the new"):
        model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == before


def test_another_prompt_mask_is_refused(compiled: Make) -> None:
    model = compiled()
    inputs, cache = prefill(model)
    mask = torch.ones(2, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(hidrop.InputError, match=r"other prompt columns"):
        model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)


def test_position_ids_that_do_not_continue_are_refused(compiled: Make) -> None:
    model = compiled()
    _, cache = prefill(model)
    ids = torch.tensor([[40], [50]])
    with pytest.raises(hidrop.InputError, match=r"position_ids \[\[40\], \[50\]\] do not continue"):
        model(input_ids=torch.tensor([[3], [4]]), position_ids=ids, past_key_values=cache)


def test_a_cache_of_another_schedule_is_refused(compiled: Make) -> None:
    _, cache = prefill(compiled("llama", PRUNED))
    with pytest.raises(hidrop.CacheError, match=r"another schedule"):
        compiled("llama", "identity")(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)


@torch.no_grad()
def test_a_copied_cache_is_a_prefix_for_several_answers(compiled: Make) -> None:
    model = compiled()
    _, cache = prefill(model)
    twin = copy.deepcopy(cache)
    assert twin.origin is cache.origin
    tokens = torch.tensor([[3], [4]])
    first = model(input_ids=tokens, past_key_values=cache).logits
    assert twin.get_seq_length() == cache.get_seq_length() - 1
    torch.testing.assert_close(model(input_ids=tokens, past_key_values=twin).logits, first)


def test_crop_counts_real_tokens_only(compiled: Make) -> None:
    model = compiled()
    inputs, cache = prefill(model)
    before = cache.log.next_column.tolist()
    mask = torch.ones(2, inputs["input_ids"].shape[1] + 2, dtype=torch.long)
    mask[1, -1] = 0
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4], [5, 0]]), attention_mask=mask, past_key_values=cache)
    cache.crop(-2)
    assert cache.log.next_column.tolist() == before
    with pytest.raises(hidrop.InputError, match=r"negative"):
        cache.crop(2)


def test_packed_sequences_fill_no_cache(compiled: Make) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(hidrop.InputError, match=r"packed sequences"):
        compiled()(input_ids=ids, position_ids=positions)


def test_generate_without_a_cache_is_refused_under_a_schedule(compiled: Make) -> None:
    model = compiled()
    with pytest.raises(hidrop.InputError, match=r"use_cache=False"):
        model.generate(**batch(model, ROWS), max_new_tokens=2, use_cache=False)


def test_generate_runs_under_autocast(compiled: Make) -> None:
    model = compiled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.generate(**batch(model, ROWS), max_new_tokens=3, do_sample=False)
    assert output.shape[1] == batch(model, ROWS)["input_ids"].shape[1] + 3


@torch.no_grad()
def test_a_cache_from_inference_mode_goes_on_outside(compiled: Make) -> None:
    model = compiled()
    token = torch.tensor([[3], [4]])
    with torch.inference_mode():
        _, cache = prefill(model)
        model(input_ids=token, past_key_values=cache)
    _, other = prefill(model)
    model(input_ids=token, past_key_values=other)
    again = model(input_ids=token, past_key_values=cache).logits
    torch.testing.assert_close(again, model(input_ids=token, past_key_values=other).logits)


def test_a_failed_prefill_leaves_its_cache_empty(
    compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled()
    runtime = runtime_in(model)
    cache = HidropCache()
    inputs = batch(model, ROWS)
    with monkeypatch.context() as patched:
        patched.setattr(type(runtime.programs), "executable", _fail)
        with pytest.raises(MemoryError):
            model(**inputs, past_key_values=cache)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def _fail(*_: Any, **__: Any) -> None:
    raise MemoryError


@pytest.fixture
def adapted() -> tuple[Any, Any]:
    """The same LoRA model twice, the second not compiled."""
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    models = []
    for _ in range(2):
        model = tiny_llava()
        config = peft.LoraConfig(
            r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
        )
        torch.manual_seed(1)
        models.append(peft.get_peft_model(model, config).eval())
    hidrop.compile(models[0].get_base_model(), "identity", backend="eager")
    return models[0], models[1]


@torch.no_grad()
def test_adapter_switched_off_and_merged_equals_hf(adapted: tuple[Any, Any]) -> None:
    ours, theirs = adapted
    inputs = batch(ours.get_base_model(), ROWS)
    logits = []
    for model in (ours, theirs):
        on = model(**inputs).logits
        with model.disable_adapter():
            off = model(**inputs).logits
        model.merge_adapter()
        logits.append((on, off, model(**inputs).logits))
    for mine, reference in zip(*logits, strict=True):
        torch.testing.assert_close(mine, reference, atol=5e-5, rtol=1e-4)
    assert (logits[1][0] - logits[1][1]).abs().max() > 0.1


def test_a_peft_wrapper_is_compiled_inside(adapted: tuple[Any, Any]) -> None:
    ours, theirs = adapted
    inputs = batch(ours.get_base_model(), ROWS)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert hidrop.compile(theirs, "identity", backend="eager") is theirs
        assert hidrop.is_compiled(theirs)
        assert hidrop.is_compiled(theirs.get_base_model())
        torch.testing.assert_close(theirs(**inputs).logits, expected, atol=5e-5, rtol=1e-4)
    hidrop.restore(theirs)
    assert not hidrop.is_compiled(theirs)


def test_hooks_on_layers_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_llava(num_layers=2)
    model.model.language_model.layers[1].register_forward_hook(lambda *_: None)
    hidrop.compile(model, "identity", backend="eager")
    with torch.no_grad():
        model(**batch(model, ROWS))
    assert "hooks on layers.1 of the decoder do not run" in caplog.text


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    model: Any = tiny_llava(num_layers=2)

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Other
    with pytest.raises(hidrop.UnsupportedModelError, match=r"Other overrides forward"):
        hidrop.compile(model, "identity")


def test_dynamic_rope_is_refused() -> None:
    model: Any = tiny_llava(num_layers=2)
    text = model.config.text_config
    text.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(text)
    with pytest.raises(hidrop.UnsupportedModelError, match=r"rope_type='dynamic'"):
        hidrop.compile(model, "identity")


def test_two_models_run_from_two_threads() -> None:
    """After their first calls: torch.export, which those need, changes modules for all threads."""
    models: list[Any] = [
        hidrop.compile(tiny_llava(num_layers=2, seed=s), "inject=1", backend="eager")
        for s in range(2)
    ]

    def generate(model: Any) -> Tensor:
        inputs = batch(model, ROWS)
        ids: Tensor = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=EOS)
        return ids

    expected = [generate(model) for model in models]
    results: dict[int, Tensor] = {}

    def run(index: int) -> None:
        for _ in range(5):
            results[index] = generate(models[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i].tolist() for i in range(2)] == [ids.tolist() for ids in expected]


def test_a_runtime_can_be_pickled(compiled: Make) -> None:
    runtime = runtime_in(compiled())
    state = {k: v for k, v in runtime.__getstate__().items() if k != "model"}
    assert pickle.loads(pickle.dumps(state))["schedule"] == runtime.schedule


@torch.no_grad()
def test_logits_to_keep_behind_a_cache_are_those_of_the_last_valid_column(compiled: Make) -> None:
    """New tokens padded on the right, as in the next turn of a batch."""
    model = compiled("llama", PRUNED)
    rows = [[5, 6, IMAGE, 7], [8, 9, 10]]
    inputs = batch(model, rows)
    new = torch.tensor([[4, 5, 6], [7, 0, 0]])
    mask = torch.cat([inputs["attention_mask"], (new != 0).long()], dim=1)
    cache = model(**inputs).past_key_values
    found = model(input_ids=new, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    for k, row in enumerate(rows):
        alone = model(**batch(model, [row])).past_key_values
        wanted = model(input_ids=new[k : k + 1, : mask[k, -3:].sum()], past_key_values=alone)
        torch.testing.assert_close(found.logits[k, -1], wanted.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_second_turn_padded_on_the_right_equals_each_row_alone(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    rows = [[5, 6, IMAGE, 7], [8, 9, 10]]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    new = torch.tensor([[4, 5, 6], [7, 0, 0]])

    def second(inputs: dict[str, Tensor], new: Tensor) -> Tensor:
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, new], dim=1)
        between = torch.ones(len(ids), 4, dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], between, (new != 0).long()], dim=1)
        given = {"attention_mask": mask, "past_key_values": first.past_key_values}
        return model.generate(input_ids=ids, **given, **options)[:, -4:]

    found = second(batch(model, rows), new)
    for k, row in enumerate(rows):
        one = batch(model, [row])
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        assert torch.equal(found[k], second(one, new[k : k + 1, : (new[k] != 0).sum()])[0])


@torch.no_grad()
def test_a_cache_grows_in_steps(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    inputs = batch(model, ROWS)
    options = {"do_sample": False, "return_dict_in_generate": True}
    ended = {"eos_token_id": list(range(97)), "pad_token_id": 0}
    short = model.generate(**inputs, max_new_tokens=200, **ended, **options)
    long = model.generate(**inputs, max_new_tokens=100_000, **ended, **options)
    assert long.past_key_values.nbytes < 2 * short.past_key_values.nbytes
    free = model.generate(**inputs, max_new_tokens=600, eos_token_id=None, **options)
    assert free.past_key_values.layers[0].filled < free.past_key_values.layers[0].keys.shape[2]
