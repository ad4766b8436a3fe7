"""Gradients reach all that requires them, whatever form a call has, as Hugging Face's do; or the call is refused.

Each form of a call is held against plain Hugging Face under `Schedule()`, and against the reference under a real
schedule, for each choice of what requires a gradient: the set of gradients, and their values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from tests.support.backbones import tiny_backbone
from tests.support.gradients import assert_gradients_close, gradients
from tests.support.models import IMAGE, batch, random_labels, tiny_llava
from tests.support.reference import Reference, split_batch
from tests.support.runtimes import graph_runner, runtime_in

ROWS = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 10]]
NEW = torch.tensor([[11, 12, 13], [14, 15, 16]])

Inputs = dict[str, Any]
Form = Callable[[Any, Inputs], Tensor]
"""Calls a model and returns a scalar."""

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


def scalar(states: Tensor) -> Tensor:
    """A sum in which every element counts differently."""
    weights = torch.linspace(-1.0, 1.0, states.numel()).view(states.shape)
    return (weights * states.float().tanh()).sum()


# Forms of a call.


def with_labels(model: Any, inputs: Inputs) -> Tensor:
    labels = random_labels({"input_ids": IDS, "attention_mask": inputs["attention_mask"]})
    labels[:, 0] = -100
    loss: Tensor = model(**inputs, labels=labels).loss
    return loss


def with_a_cache(model: Any, inputs: Inputs) -> Tensor:
    logits = model(**inputs, use_cache=True).logits
    return scalar(logits[inputs["attention_mask"].bool()])


def last_row(model: Any, inputs: Inputs) -> Tensor:
    # Plain Hugging Face gives the last column, which is padding in a shorter row on the right.
    return scalar(model(**inputs, use_cache=True, logits_to_keep=1).logits)


def hidden_states(model: Any, inputs: Inputs) -> Tensor:
    found = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    return sum((scalar(states[real]) for states in found), torch.zeros(()))


def without_head(model: Any, inputs: Inputs) -> Tensor:
    output = model.model(**inputs, use_cache=True)
    return scalar(output.last_hidden_state[inputs["attention_mask"].bool()])


def image_states(model: Any, inputs: Inputs) -> Tensor:
    found = model(**inputs, use_cache=True).image_hidden_states
    return scalar(found if isinstance(found, Tensor) else torch.cat(list(found)))


def behind(model: Any, cache: Any, mask: Tensor, new: Tensor, **options: Any) -> Tensor:
    """Logits of new tokens, and the mask for the next."""
    full = torch.cat([mask, torch.ones_like(new)], dim=1)
    logits: Tensor = model(
        input_ids=new, attention_mask=full, past_key_values=cache, **options
    ).logits
    return logits


def behind_a_prompt(model: Any, inputs: Inputs) -> Tensor:
    cache = model(**inputs, use_cache=True).past_key_values
    return scalar(behind(model, cache, inputs["attention_mask"], NEW))


def behind_a_constant_prompt(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return scalar(behind(model, cache, inputs["attention_mask"], NEW))


def token_by_token(model: Any, inputs: Inputs) -> Tensor:
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    mask, total = inputs["attention_mask"], scalar(output.logits)
    for k in range(NEW.shape[1]):
        new = NEW[:, k : k + 1]
        total = total + scalar(behind(model, output.past_key_values, mask, new))
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    return total


def new_labels(model: Any, inputs: Inputs) -> Tensor:
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEW)], dim=1)
    given = {"input_ids": NEW, "attention_mask": mask, "past_key_values": cache}
    loss: Tensor = model(**given, labels=NEW).loss
    return loss


def new_states(model: Any, inputs: Inputs) -> Tensor:
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEW)], dim=1)
    given = {"input_ids": NEW, "attention_mask": mask, "past_key_values": cache}
    found = model(**given, output_hidden_states=True).hidden_states
    return sum((scalar(states) for states in found), torch.zeros(()))


def new_embeddings(model: Any, inputs: Inputs) -> Tensor:
    """Soft tokens behind a prompt, as an attack or a tuned suffix has them."""
    cache = model(**inputs, use_cache=True).past_key_values
    soft = inputs["pixel_values"].flatten()[: 2 * 2 * 32].view(2, 2, 32).tanh()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    given = {"inputs_embeds": soft, "attention_mask": mask, "past_key_values": cache}
    return scalar(model(**given).logits)


def two_answers(model: Any, inputs: Inputs) -> Tensor:
    """A pair of answers behind one prompt, as rows of its repeated cache."""
    output = model(**inputs, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(2)
    mask = inputs["attention_mask"].repeat_interleave(2, dim=0)
    new = torch.cat([NEW, NEW + 20])[[0, 2, 1, 3]]
    return scalar(behind(model, cache, mask, new))


def taken_back(model: Any, inputs: Inputs) -> Tensor:
    """One answer, cropped away, then another."""
    cache = model(**inputs, use_cache=True).past_key_values
    mask = inputs["attention_mask"]
    first = scalar(behind(model, cache, mask, NEW))
    cache.crop(-NEW.shape[1])
    return first - 2 * scalar(behind(model, cache, mask, NEW + 20))


def some_rows(model: Any, inputs: Inputs) -> Tensor:
    cache = model(**inputs, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1, 0]))
    return scalar(behind(model, cache, inputs["attention_mask"][[1, 0]], NEW))


PROMPTS: list[Form] = [
    with_labels,
    with_a_cache,
    last_row,
    hidden_states,
    without_head,
    image_states,
]
CONTINUED: list[Form] = [
    behind_a_prompt,
    behind_a_constant_prompt,
    token_by_token,
    new_labels,
    new_states,
    new_embeddings,
    two_answers,
    taken_back,
    some_rows,
]

# What requires a gradient.


def _only(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


REQUIRE: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "tower": _only("vision_tower"),
    "projector": _only("projector"),
    "one layer": _only("layers.1.mlp", "language_model.layers.1.self_attn.v_proj"),
    "embeddings": _only("embed_tokens"),
    "head": _only("lm_head"),
    "inputs": lambda name: False,
}
EMBEDS = ("inputs", "one layer")

IDS = batch(tiny_llava(num_layers=1), ROWS, padding="left")["input_ids"]


def inputs_for(model: Any, requires: str, given: str = "pixels") -> tuple[Inputs, list[Tensor]]:
    """Inputs of the prompt, and those of them whose gradients are looked at.

    Args:
        given: images as "pixels" or as "features"; or tokens as "embeds".
    """
    inputs: Inputs = batch(model, ROWS, padding="left")
    leaves = []
    if requires == "inputs":
        inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_()
        leaves.append(inputs["pixel_values"])
    if given == "features":
        features = model.model.get_image_features(pixel_values=inputs.pop("pixel_values"))
        encoded = SimpleNamespace(pooler_output=features.pooler_output)
        inputs["mm_encoder_outputs"] = {"image": encoded}
    if given == "embeds":
        table = model.get_input_embeddings()
        embeds = table(inputs.pop("input_ids"))
        if requires == "inputs":
            embeds = embeds.detach().requires_grad_()
            leaves.append(embeds)
        inputs["inputs_embeds"] = embeds
    return inputs, leaves


def found_gradients(
    model: Any, form: Form, requires: str, given: str = "pixels"
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients, by parameter or number of input; None where there is none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(REQUIRE[requires](name))
        parameter.grad = None
    inputs, leaves = inputs_for(model, requires, given)
    loss = form(model, inputs)
    if loss.requires_grad:
        loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if REQUIRE[requires](n)}
    found = wanted | {str(k): leaf.grad for k, leaf in enumerate(leaves)}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return loss.detach(), {name: None if g is None else g.clone() for name, g in found.items()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal sets and values; a gradient of zeros counts as none: some of Hugging Face's own are so."""

    def real(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {n: g for n, g in gradients.items() if g is not None and bool(g.any())}

    ours, theirs = real(found), real(expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # Softmax does not see a bias of keys: its gradient is rounding alone.
        floor = 1e-5 if name.endswith("k_proj.bias") else 1e-6
        room = 1e-4 * float(gradient.abs().max()) + floor
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=room, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiny_llava("qwen2", num_layers=3)


@pytest.fixture(scope="module")
def made() -> Callable[..., Any]:
    """`made("identity", cuda_graphs=True)`: one compiled model for each, with the weights of `theirs`."""
    models: dict[Any, Any] = {}

    def make(schedule: str, **options: Any) -> Any:
        key = (schedule, *sorted(options.items()))
        if key not in models:
            model = tiny_llava("qwen2", num_layers=3)
            models[key] = hidrop.compile(model, schedule, backend="eager", **options)
        return models[key].eval()

    return make


SCHEDULE = "inject=1,prune=1:6+2:3"


@pytest.mark.parametrize("requires", REQUIRE)
@pytest.mark.parametrize("form", PROMPTS + CONTINUED, ids=lambda f: f.__name__)
def test_gradients_are_those_of_hugging_face(
    made: Callable[..., Any], theirs: Any, form: Form, requires: str
) -> None:
    loss, expected = found_gradients(theirs, form, requires)
    ours, found = found_gradients(made("identity"), form, requires)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


@pytest.mark.parametrize("requires", EMBEDS)
@pytest.mark.parametrize("given", ["features", "embeds"])
@pytest.mark.parametrize("form", [with_labels, with_a_cache, behind_a_prompt, token_by_token])
def test_gradients_of_features_and_embeddings_are_those_of_hugging_face(
    made: Callable[..., Any], theirs: Any, form: Form, given: str, requires: str
) -> None:
    if (
        given == "features"
        and "mm_encoder_outputs" not in signature(theirs.model.forward).parameters
    ):
        pytest.skip("this transformers takes no features")
    loss, expected = found_gradients(theirs, form, requires, given)
    ours, found = found_gradients(made("identity"), form, requires, given)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)
    if given == "embeds" and requires == "inputs":
        assert found["1"] is not None


@pytest.mark.parametrize("requires", ["all", "inputs", "tower", "one layer"])
@pytest.mark.parametrize("form", [with_labels, with_a_cache, *CONTINUED], ids=lambda f: f.__name__)
def test_recorded_calls_give_the_gradients_of_plain_ones(
    made: Callable[..., Any], form: Form, requires: str
) -> None:
    """What requires a gradient changes from call to call, and no recording goes on without it."""
    loss, expected = found_gradients(made(SCHEDULE), form, requires)
    ours, found = found_gradients(made(SCHEDULE, cuda_graphs=True), form, requires)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


@pytest.mark.parametrize("requires", ["tower", "inputs"])
def test_an_overlapped_tower_gets_its_gradients(made: Callable[..., Any], requires: str) -> None:
    loss, expected = found_gradients(made(SCHEDULE), with_a_cache, requires)
    for options in ({"cuda_graphs": True}, {}):
        model = made(SCHEDULE, overlap_vision=True, **options)
        with torch.no_grad():
            model(**inputs_for(model, "all")[0], use_cache=True)
        ours, found = found_gradients(model, with_a_cache, requires)
        torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
        assert_same(found, expected)


@pytest.mark.parametrize("form", [with_labels, hidden_states], ids=lambda f: f.__name__)
@pytest.mark.parametrize("requires", ["all", "inputs", "one layer", "projector"])
def test_recomputed_activations_give_the_same_gradients(
    made: Callable[..., Any], form: Form, requires: str
) -> None:
    model = made(SCHEDULE).train()
    loss, expected = found_gradients(model, form, requires)
    model.gradient_checkpointing_enable()
    try:
        ours, found = found_gradients(model, form, requires)
    finally:
        model.gradient_checkpointing_disable()
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


# Under a schedule: against the reference.


def reference_behind(model: Any, schedule: str, inputs: Inputs, *, constant: bool) -> Tensor:
    """Logits [B, q, V] of the new tokens, one row and token after another."""
    reference, rows = Reference(model, hidrop.Schedule.parse(schedule)), []
    for row, new in zip(split_batch(model, inputs), NEW, strict=True):
        with torch.set_grad_enabled(not constant):
            prompt = reference.prefill(row.input_ids, row.features)
        caches = prompt.caches
        if constant:
            caches = [replace(c, keys=c.keys.detach(), values=c.values.detach()) for c in caches]
        steps = [
            reference._decode(int(token), prompt.length + k, caches) for k, token in enumerate(new)
        ]
        rows.append(torch.stack(steps))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
@pytest.mark.parametrize("requires", ["all", "inputs", "tower", "one layer"])
@pytest.mark.parametrize("constant", [False, True])
def test_gradients_behind_a_prompt_are_those_of_the_reference(
    made: Callable[..., Any], theirs: Any, constant: bool, requires: str, positions: str
) -> None:
    schedule = SCHEDULE + f",exit=2,positions={positions}".replace("exit=2,", "")

    def reference(model: Any, inputs: Inputs) -> Tensor:
        return scalar(reference_behind(model, schedule, inputs, constant=constant))

    form = behind_a_constant_prompt if constant else behind_a_prompt
    loss, expected = found_gradients(theirs, reference, requires)
    ours, found = found_gradients(made(schedule), form, requires)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)
    if requires == "tower" and not constant:
        assert any(g is not None and bool(g.any()) for g in found.values())


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3"])
def test_gradients_behind_a_prompt_are_those_of_the_reference_for_every_backbone(
    backbone: str,
) -> None:
    window = {"llama": None, "mistral": 6, "qwen3": 6}[backbone]
    plain = tiny_llava(backbone, num_layers=3, sliding_window=window, kv_heads=2)
    model: Any = tiny_llava(backbone, num_layers=3, sliding_window=window, kv_heads=2)
    hidrop.compile(model, SCHEDULE, backend="eager")

    def reference(model: Any, inputs: Inputs) -> Tensor:
        return scalar(reference_behind(model, SCHEDULE, inputs, constant=False))

    loss, expected = found_gradients(plain, reference, "all")
    ours, found = found_gradients(model, behind_a_prompt, "all")
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "granite", "lfm2"])
def test_gradients_behind_a_prompt_of_other_attentions_are_those_of_hugging_face(name: str) -> None:
    """Soft caps, sinks, scaled embeddings, convolutions."""
    plain, model = tiny_backbone(name), tiny_backbone(name)
    hidrop.compile(model, "identity", backend="eager")
    loss, expected = found_gradients(plain, behind_a_prompt, "all")
    ours, found = found_gradients(model, behind_a_prompt, "all")
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


# What a cache remembers.


def test_calls_without_gradients_behind_those_with_see_the_same_tokens(
    made: Callable[..., Any],
) -> None:
    model = made(SCHEDULE)
    inputs = batch(model, ROWS, padding="left")
    mask, results = inputs["attention_mask"], []
    for differentiable in (True, False):
        with torch.set_grad_enabled(differentiable):
            cache = model(**inputs).past_key_values
            behind(model, cache, mask, NEW)
        longer = torch.cat([mask, torch.ones_like(NEW)], dim=1)
        with torch.no_grad():
            results.append(behind(model, cache, longer, NEW[:, :1]))
        assert cache.linked is None
    torch.testing.assert_close(*results)


def test_copies_of_a_cache_meet_in_the_gradients_of_its_prompt(
    made: Callable[..., Any], theirs: Any
) -> None:
    """Plain Hugging Face refuses such a copy; two prompts give the same."""

    def copied(model: Any, inputs: Inputs) -> Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        twin, mask = copy.deepcopy(cache), inputs["attention_mask"]
        first = scalar(behind(model, cache, mask, NEW))
        return first - scalar(behind(model, twin, mask, NEW + 20))

    def twice(model: Any, inputs: Inputs) -> Tensor:
        mask = inputs["attention_mask"]
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        first, second = (
            scalar(behind(model, cache, mask, new))
            for cache, new in zip(caches, (NEW, NEW + 20), strict=True)
        )
        return first - second

    loss, expected = found_gradients(theirs, twice, "all")
    ours, found = found_gradients(made("identity"), copied, "all")
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    assert_same(found, expected)


def test_a_failed_call_leaves_the_gradients_of_a_cache(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(SCHEDULE)

    def failing(model: Any, inputs: Inputs) -> Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        linked, mask = cache.linked, inputs["attention_mask"]
        with pytest.raises(hidrop.InputError), torch.no_grad():
            behind(model, cache, mask[:, 1:], NEW)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(type(runtime_in(model).programs), "executable", _fail)
            with pytest.raises(MemoryError):
                behind(model, cache, mask, NEW)
        assert cache.linked is linked
        return scalar(behind(model, cache, mask, NEW))

    loss, expected = found_gradients(model, behind_a_prompt, "all")
    ours, found = found_gradients(model, failing, "all")
    torch.testing.assert_close(ours, loss)
    assert_same(found, expected)


def _fail(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_a_constant_prompt_is_said_so_once(
    made: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "inject=1", backend="eager")
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        found_gradients(model, behind_a_prompt, "all")
        assert "is a constant" not in caplog.text
        for _ in range(2):
            found_gradients(model, behind_a_constant_prompt, "all")
    assert caplog.text.count("is a constant") == 1


def test_nothing_that_requires_a_gradient_makes_no_other_program(made: Callable[..., Any]) -> None:
    model: Any = hidrop.compile(tiny_llava(num_layers=2), "inject=1", backend="eager")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = batch(model, ROWS, padding="left")
    cache = model(**inputs).past_key_values
    assert not behind(model, cache, inputs["attention_mask"], NEW).requires_grad
    assert cache.linked is None
    names = [e.program.name for c in runtime_in(model).programs.captures.values()
             for e in c.executables.values()]  # fmt: skip
    assert not [name for name in names if "differentiable" in name]


# Ratios.


@pytest.mark.parametrize("rank", ["hard", "soft"])
def test_learned_ratios_get_the_same_gradient_with_and_without_a_cache(rank: str) -> None:
    schedule = hidrop.Schedule(inject=1, prune={1: 6, 2: 3}, selection="dtopk", rank=rank)
    model: Any = hidrop.compile(tiny_llava(num_layers=3), schedule, backend="eager").train()
    inputs = batch(model, ROWS, padding="left")
    found = []
    for use_cache in (False, True):
        model.zero_grad(set_to_none=True)
        scalar(model(**inputs, use_cache=use_cache, logits_to_keep=1).logits).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert bool(found[0]["hidrop_ratios.values"].any())
    assert_same(found[1], found[0])


# Recordings.


def test_parameters_released_later_get_their_gradients(made: Callable[..., Any]) -> None:
    model = made(SCHEDULE, cuda_graphs=True).train()
    for requires in ("one layer", "all", "head", "all"):
        loss, expected = found_gradients(made(SCHEDULE).train(), with_labels, requires)
        ours, found = found_gradients(model, with_labels, requires)
        torch.testing.assert_close(ours, loss)
        assert_same(found, expected)
    assert len(graph_runner(model).entries) >= 1


def test_a_second_backward_through_a_recording_is_refused(made: Callable[..., Any]) -> None:
    model = made(SCHEDULE, cuda_graphs=True).train()
    loss = with_labels(model, inputs_for(model, "all")[0])
    loss.backward(retain_graph=True)
    with pytest.raises(hidrop.HidropError, match=r"second backward .*cuda_graphs=False"):
        loss.backward()
    model.zero_grad(set_to_none=True)


def test_a_gradient_of_gradients_is_refused_by_a_recording(made: Callable[..., Any]) -> None:
    """Else it would be one of what lies around the recording alone."""
    model = made(SCHEDULE, cuda_graphs=True).train()
    embeds = torch.randn(
        1, 6, 32, requires_grad=True
    )  # a text alone: the tower's kernel has no second derivative
    loss = model(inputs_embeds=embeds, labels=torch.tensor([[-100, -100, 5, 6, 7, 8]])).loss
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gradient.square().sum().backward()
    model.zero_grad(set_to_none=True)


# Others' ways to a gradient.


def test_lora_alone_gets_the_gradients_of_hugging_face() -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    results = []
    for compiled in (True, False):
        model: Any = tiny_llava(num_layers=2)
        config = peft.LoraConfig(
            r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
        )
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config).eval()
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        inputs = batch(model, ROWS, padding="left")
        for form in (behind_a_prompt, behind_a_constant_prompt, token_by_token):
            adapted.zero_grad(set_to_none=True)
            form(adapted, inputs).backward()
            results.append(
                {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
            )
    assert results[0]
    for ours, expected in zip(results[:3], results[3:], strict=True):
        assert_same(ours, expected)


def test_parameters_given_for_one_call_are_refused() -> None:
    """As meta-learning and influence functions give them: a graph would go on with the model's own."""
    model: Any = hidrop.compile(tiny_llava("llama", num_layers=2), "identity", backend="eager")
    inputs = batch(model, ROWS, padding="left")
    expected = model(**inputs).logits
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    given = {name: (model.get_parameter(name).detach() * 1.5).requires_grad_()}
    with pytest.raises(hidrop.CaptureError, match=r"layers\.1\.mlp\.up_proj\.weight is a Tensor"):
        torch.func.functional_call(model, given, args=(), kwargs=inputs)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_sharding_after_a_first_call_is_followed(made: Callable[..., Any], tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = hidrop.compile(tiny_llava(num_layers=2), "inject=1", backend="eager").train()
    inputs = inputs_for(model, "all")[0]
    loss = with_labels(model, inputs)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for each in (model.model.language_model.layers[1], model):
            fully_shard(each, mesh=mesh)
        again = with_labels(model, inputs)
        again.backward()
        torch.testing.assert_close(again, loss)
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        assert_gradients_close(found, expected, rel=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


class Scaling:
    """A custom pass that multiplies what the first layer gives by a parameter of its own."""

    __name__ = "scaling"

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def __call__(self, program: Program, plan: Plan) -> PassResult:
        region, following = program.regions[0], program.regions[1]
        weight = program.add_parameter("scaling", self.weight)
        before = following.nodes[0]
        scaled = program.call(torch.mul, region.live_out, weight, before=before)
        following.read(region.live_out, scaled)
        following.hidden = scaled
        return PassResult(matched=1)


def test_a_parameter_of_a_custom_pass_gets_its_gradient_through_the_cache() -> None:
    """All else is frozen, and the whole text in one call gives the same."""
    scaling = Scaling()
    model: Any = hidrop.compile(
        tiny_llava(num_layers=3), "identity", backend="eager", passes=[scaling]
    )
    model.requires_grad_(False)
    inputs = batch(model, ROWS, padding="left")
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEW)], dim=1)
    found = []
    for cached in (True, False):
        scaling.weight.grad = None
        if cached:
            loss = behind_a_prompt(model, inputs)
        else:
            ids = torch.cat([inputs["input_ids"], NEW], dim=1)
            given = inputs | {"input_ids": ids, "attention_mask": mask}
            loss = scalar(model(**given, use_cache=False).logits[:, -NEW.shape[1] :])
        loss.backward()
        found.append((loss.detach(), scaling.weight.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def return_squares(program: Program, plan: Plan) -> PassResult:
    """Return the squares of what the first layer gives."""
    state, end = program.regions[0].live_out, program.graph.output_node()
    squares = program.call(torch.mul, state, state, before=end)
    program.returns({**program.outputs, "squares": squares})
    return PassResult(matched=1)


def test_outputs_of_a_custom_pass_behind_a_prompt_carry_gradients() -> None:
    """As the hidden states that they are the squares of."""
    model: Any = hidrop.compile(
        tiny_llava(num_layers=3), SCHEDULE, backend="eager", passes=[return_squares]
    )

    def form(of: Callable[[Any], Tensor]) -> Form:
        def run(model: Any, inputs: Inputs) -> Tensor:
            cache = model(**inputs, use_cache=True).past_key_values
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEW)], dim=1)
            given = {"input_ids": NEW, "attention_mask": mask, "past_key_values": cache}
            return scalar(of(model(**given, output_hidden_states=True)))

        return run

    squares = form(lambda output: output.pass_outputs["squares"])
    states = form(lambda output: output.hidden_states[1].square())
    loss, expected = found_gradients(model, states, "all")
    ours, found = found_gradients(model, squares, "all")
    torch.testing.assert_close(ours, loss)
    assert_same(found, expected)
