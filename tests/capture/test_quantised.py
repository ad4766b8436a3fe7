"""Quantised weights: what torchao's `quantize_` or Hugging Face's `TorchAoConfig` made runs compiled.

Over 400 lines: the kinds of quantised weights are one list, which every part of the package is tested with.

Weights that are rounded once are held to float tolerance against the eager reference over the same quantised modules.
Where activations are rounded too the function has steps: a difference in the last bit moves a value across one, and the
reference itself moves by `spread` when its inputs do. That is the tolerance there, and the identity schedule, which
does what Hugging Face does operation by operation, has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.devices import on_cuda
from tests.support.models import IMAGE, PRUNED, batch, random_labels, tiny_llava
from tests.support.reference import reference_generations, reference_logits, reference_rows
from tests.support.weights import Halves

WEIGHTS = ("int8", "float8", "int4")
"""Of these the weights alone are rounded."""
ROWS = [[5, 6, IMAGE, 7], [8, 9, IMAGE]]
SCHEDULE = hidrop.Schedule.parse(PRUNED)
FLOAT = {"rtol": 1e-4, "atol": 1e-4}
Call = Mapping[str, Tensor]


def torchao() -> Any:
    return pytest.importorskip(
        "torchao.quantization", reason="torchao is missing: pip install 'hidrop-fx[quant]'"
    )


def config(name: str) -> Any:
    ao = torchao()
    made: dict[str, Any] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "float8": ao.Float8WeightOnlyConfig,
        "int4": lambda: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),
        # The two below have kernels for GPUs alone.
        "int4_cuda": lambda: ao.Int4WeightOnlyConfig(
            group_size=32, int4_packing_format="tile_packed_to_4d"
        ),
        "float8_cuda": ao.Float8DynamicActivationFloat8WeightConfig,
    }
    return made[name]()


def quantise(model: Any, name: str) -> Any:
    """Quantise all linear layers of the text decoder."""
    torchao().quantize_(model.model.language_model, config(name))
    return model


def quantised(name: str, backbone: str = "llama", **options: Any) -> Any:
    return quantise(tiny_llava(backbone, **options), name)


@torch.no_grad()
def logits(model: Any, inputs: Call) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@torch.no_grad()
def expected_logits(model: Any, inputs: Call, schedule: hidrop.Schedule = SCHEDULE) -> Tensor:
    return reference_logits(model, schedule, inputs)


@torch.no_grad()
def spread(model: Any, inputs: Call, schedule: hidrop.Schedule = SCHEDULE) -> float:
    """How far the reference's logits move when embeddings change by a millionth, some bits of fp32."""
    embeddings = model.get_input_embeddings().weight
    before, answer = embeddings.clone(), expected_logits(model, inputs, schedule)
    moves = []
    for seed in range(4):
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
        embeddings.copy_(before * (1 + 1e-6 * noise))
        moves.append(float((expected_logits(model, inputs, schedule) - answer).abs().max()))
    embeddings.copy_(before)
    return max(moves)


def tolerance(
    name: str, model: Any, inputs: Call, schedule: hidrop.Schedule = SCHEDULE
) -> dict[str, float]:
    """Where activations are rounded, what two runs that differ in their last bits may be apart."""
    if name != "int8_dynamic":
        return FLOAT
    return {"rtol": 0.0, "atol": 2 * spread(model, inputs, schedule)}


def check_generation(
    model: Any, inputs: Call, apart: float, schedule: hidrop.Schedule = SCHEDULE
) -> None:
    """Greedy tokens are the reference's, up to one that is chosen by less than logits may be apart."""
    start = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=5)[:, start:].tolist()
    wanted = reference_generations(model, schedule, inputs, 5, eos=2)
    checked = 0
    for row, one in zip(tokens, wanted, strict=True):
        sure = [margin > 2 * apart for margin in one.margins]
        count = sure.index(False) if False in sure else len(sure)
        assert row[:count] == one.tokens[:count]
        checked += count
    assert checked > 0, "every row begins with a tie, so that the test says nothing"


@pytest.mark.parametrize("name", [*WEIGHTS, "int8_dynamic"])
@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_quantised_model_equals_the_reference_over_the_same_weights(
    backbone: str, name: str
) -> None:
    model = quantised(name, backbone)
    inputs = batch(model, ROWS)
    wanted, allowed = expected_logits(model, inputs), tolerance(name, model, inputs)
    hidrop.compile(model, SCHEDULE, backend="eager")
    torch.testing.assert_close(logits(model, inputs), wanted, **allowed)
    check_generation(model, inputs, allowed["atol"])


@pytest.mark.parametrize("name", ["int8", "int8_dynamic"])
def test_quantised_identity_is_bit_equal_to_hf(name: str) -> None:
    model = quantised(name)
    inputs = batch(model, ROWS[:1])
    labels = random_labels(inputs)
    plain = logits(model, inputs)
    model.train()(**inputs, labels=labels).loss.backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    hidrop.compile(model.eval(), hidrop.Schedule(), backend="eager")
    assert torch.equal(logits(model, inputs), plain)
    model.train()(**inputs, labels=labels).loss.backward()
    assert any(gradient is not None for gradient in gradients.values())
    for path, parameter in model.named_parameters():
        if gradients[path] is None:
            assert parameter.grad is None, path
        else:
            assert torch.equal(parameter.grad, gradients[path]), path


# Of a weight of a normal row the error is uniform within half a step, and the step rowmax / 127: about 2.3 / 127 / 12**0.5
# of its size, half a per cent. So is an activation's. The errors of the seven products of four layers add up like noise.
ROUNDING = 2.3 / 127 / 12**0.5 * (7 * 4) ** 0.5


@pytest.mark.parametrize(("name", "sources"), [("int8", 1), ("int8_dynamic", 2)])
@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_quantised_logits_differ_from_full_precision_by_rounding_alone(
    backbone: str, name: str, sources: int
) -> None:
    plain, model = tiny_llava(backbone), quantised(name, backbone)
    inputs = batch(model, ROWS)
    kept = [row.kept for row in reference_rows(plain, SCHEDULE, inputs)]
    assert [row.kept for row in reference_rows(model, SCHEDULE, inputs)] == kept
    wanted = expected_logits(plain, inputs)
    hidrop.compile(model, SCHEDULE, backend="eager")
    error = (logits(model, inputs) - wanted).norm() / wanted.norm()
    assert 0 < error < 2 * ROUNDING * sources**0.5


@pytest.mark.parametrize("name", [pytest.param("int8", marks=pytest.mark.slow), "int8_dynamic"])
def test_shipped_model_answers_the_same_after_quantising(name: str) -> None:
    from hidrop_fx.demo.evaluate import answers
    from hidrop_fx.demo.pictures import held_out
    from hidrop_fx.models.loading import load_model

    model, processor = load_model(MODEL_DIR, device="cpu")
    asked = [(drawn, question.prompt_text) for drawn, question in held_out(3)]
    hidrop.compile(model, str(SCHEDULE_FILE), backend="eager")
    before = answers(model, processor, asked)
    quantise(model, name)
    after = answers(model, processor, asked)
    right = [question.answer for _, question in held_out(3)]
    marks = [
        [text.strip() == one for text, one in zip(t, right, strict=True)] for t in (before, after)
    ]
    assert len(set(right)) > 3
    assert all(marks[0])
    assert all(marks[1])


def test_quantising_after_the_first_call_is_followed_and_frees_the_old_weights() -> None:
    model = hidrop.compile(tiny_llava(), SCHEDULE, backend="eager")
    inputs = batch(model, ROWS)
    plain = logits(model, inputs)
    old = weakref.ref(model.model.language_model.layers[0].mlp.up_proj.weight)
    quantise(model, "int8")
    found = logits(model, inputs)
    torch.testing.assert_close(found, expected_logits(model, inputs), **FLOAT)
    assert not torch.allclose(found, plain, **FLOAT)
    assert old() is None, "the unquantised weights take memory still"


def test_restore_of_a_quantised_model_gives_hf() -> None:
    model, plain = quantised("int8"), quantised("int8")
    inputs = batch(model, ROWS)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    hidrop.compile(model, SCHEDULE, backend="eager")
    logits(model, inputs)
    assert list(model.state_dict()) == keys
    hidrop.restore(model)
    now = dict(model.named_parameters())
    assert all(now[path] is parameter for path, parameter in parameters.items())
    assert torch.equal(logits(model, inputs), logits(plain, inputs))


@pytest.mark.parametrize("lowering", ["bodies", "whole"])
def test_quantised_tower_projector_and_head_run_compiled(lowering: str) -> None:
    """Tower, projector and head too, and embeddings, which no program reads."""
    model = tiny_llava()
    kinds = (nn.Linear, nn.Embedding)
    torchao().quantize_(model, config("int8"), filter_fn=lambda m, _: isinstance(m, kinds))
    inputs = batch(model, ROWS)
    hidrop.compile(model, "inject=2", backend="eager", lowering=lowering)
    wanted = expected_logits(model, inputs, hidrop.Schedule(inject=2))
    torch.testing.assert_close(logits(model, inputs), wanted, **FLOAT)


def test_layers_of_unlike_weight_types_share_no_body() -> None:
    model = tiny_llava(num_layers=6)
    layers = model.model.language_model.layers
    for layer, name in enumerate(("int8", "int8_dynamic", "int8", "int8_dynamic")):
        torchao().quantize_(layers[layer], config(name))
    inputs = batch(model, ROWS)
    hidrop.compile(model, "exit=6", backend="eager")
    logits(model, inputs)
    used = sorted(body.used_by for body in runtime_of(model).programs.store.bodies.values())
    assert used == [
        ["prefill layer_0", "prefill layer_2"],
        ["prefill layer_1", "prefill layer_3"],
        ["prefill layer_4", "prefill layer_5"],
    ]


@pytest.mark.parametrize("name", ["int8", "int8_dynamic"])
def test_quantised_model_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    kind = type(tiny_llava())
    transformers = pytest.importorskip("transformers")
    tiny_llava().save_pretrained(tmp_path / "plain")
    torchao()
    method = transformers.TorchAoConfig(config(name))
    model = kind.from_pretrained(tmp_path / "plain", quantization_config=method)
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not nn.Parameter
    inputs, keys = batch(model, ROWS), list(model.state_dict())
    wanted, allowed = expected_logits(model, inputs), tolerance(name, model, inputs)
    hidrop.compile(model, SCHEDULE, backend="eager")
    found = logits(model, inputs)
    torch.testing.assert_close(found, wanted, **allowed)

    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved")
    assert list(again.state_dict()) == keys
    hidrop.load(again, tmp_path / "saved", backend="eager")
    assert torch.equal(logits(again, inputs), found)


def test_compare_dump_and_replay_take_a_quantised_model(tmp_path: Path) -> None:
    model = hidrop.compile(quantised("int8"), SCHEDULE, backend="eager")
    inputs = batch(model, ROWS)
    logits(model, inputs)
    assert hidrop.compare(model, **inputs).ok
    hidrop.dump(model, tmp_path)
    assert hidrop.replay(tmp_path, model, **inputs).ok


@torch.no_grad()
def forced_logits(model: Any, inputs: Call) -> Tensor:
    """Logits of the prompt's last token and of three given tokens after it."""
    found = model(**inputs, use_cache=True)
    mask, rows = inputs["attention_mask"], [found.logits[:, -1]]
    for token in (11, 12, 13):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = mask.new_full((len(mask), 1), token)
        found = model(input_ids=ids, attention_mask=mask, past_key_values=found.past_key_values)
        rows.append(found.logits[:, -1])
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.xdist_group("inductor_quantised")
@pytest.mark.parametrize(
    ("name", "called"),
    [("int8", True), ("int8_dynamic", False)],
    ids=["weights, after a call", "activations too, before compile"],
)
def test_quantised_model_through_inductor_equals_the_reference(name: str, called: bool) -> None:
    schedule = hidrop.Schedule(prune={1: 4})
    model = tiny_llava("qwen2", num_layers=2)
    inputs = batch(model, ROWS)
    if called:
        hidrop.compile(model, schedule)
        logits(model, inputs)
        quantise(model, name)
    else:
        hidrop.compile(quantise(model, name), schedule)
    wanted = expected_logits(model, inputs, schedule)
    allowed = tolerance(name, model, inputs, schedule)
    torch.testing.assert_close(logits(model, inputs), wanted, **allowed)
    check_generation(model, inputs, allowed["atol"], schedule)
    uncompiled = quantised(name, "qwen2", num_layers=2)
    hidrop.compile(uncompiled, schedule, backend="eager")
    steps = forced_logits(uncompiled, inputs)
    torch.testing.assert_close(forced_logits(model, inputs), steps, **allowed)
    log = runtime_of(model).programs.log
    assert {entry.name.split()[0] for entry in log.entries} == {"prefill", "decode"}
    with counter.expect(compiled=0):
        forced_logits(model, batch(model, [[5, 6, 7, 8, IMAGE, 9, 10, 11], [8, IMAGE, 12]]))
    assert log.fallbacks == []


@on_cuda
@pytest.mark.parametrize("name", ["int4_cuda", "float8_cuda"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_quantised_kernels_of_gpus_are_near_the_reference(name: str, backend: str) -> None:
    if name == "float8_cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in float8 need compute capability 8.9")
    plain = tiny_llava(dtype=torch.bfloat16, hidden_size=128, num_layers=2).cuda()
    model = quantise(tiny_llava(dtype=torch.bfloat16, hidden_size=128, num_layers=2).cuda(), name)
    inputs = batch(plain, ROWS)
    schedule = hidrop.Schedule(exit=1)  # which no rounding of a score can change
    wanted = expected_logits(model, inputs, schedule).float()
    hidrop.compile(model, schedule, backend=backend)
    found = logits(model, inputs).float()
    rounding = (wanted - expected_logits(plain, inputs, schedule).float()).norm()
    assert rounding > 0
    assert (found - wanted).norm() < rounding, "farther from the reference than quantisation is"
    model.generate(**inputs, max_new_tokens=3)
    assert runtime_of(model).programs.log.fallbacks == []


# Without torchao.


class Linear4bit(nn.Linear):
    """Has the name of bitsandbytes' layer, by which that is known."""


class Linear8bitLt(nn.Linear):
    """The one of eight bits."""


class Tuned(Linear4bit):
    """As PEFT derives its own."""


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt, Tuned])
def test_bitsandbytes_is_refused(kind: type[nn.Linear]) -> None:
    model = tiny_llava()
    model.model.language_model.layers[1].mlp.up_proj = kind(32, 64, bias=False)
    message = r"layers\.1\.mlp\.up_proj .* bitsandbytes.*Int8WeightOnlyConfig.*TorchAoConfig"
    with pytest.raises(hidrop.UnsupportedModelError, match=message):
        hidrop.compile(model, SCHEDULE)
    assert not hidrop.is_compiled(model)


def test_bitsandbytes_after_compile_is_refused_at_the_call() -> None:
    model = hidrop.compile(tiny_llava(), SCHEDULE, backend="eager")
    inputs = batch(model, ROWS)
    logits(model, inputs)
    model.model.language_model.layers[1].mlp.up_proj = Linear4bit(32, 64, bias=False)
    with pytest.raises(hidrop.UnsupportedModelError, match="bitsandbytes"):
        logits(model, inputs)


def test_bitsandbytes_outside_the_decoder_is_allowed() -> None:
    model = tiny_llava()
    head = model.lm_head.weight
    model.lm_head = Linear4bit(32, len(head), bias=False)
    model.lm_head.weight = head
    inputs = batch(model, ROWS)
    wanted = expected_logits(model, inputs)
    hidrop.compile(model, SCHEDULE, backend="eager")
    torch.testing.assert_close(logits(model, inputs), wanted, **FLOAT)


def test_weights_of_any_subclass_that_overrides_linear_run_compiled() -> None:
    model, plain = tiny_llava("qwen2"), tiny_llava("qwen2")
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Halves(module.weight.detach() / 2), requires_grad=False)
    inputs = batch(model, ROWS)
    hidrop.compile(model, SCHEDULE, backend="eager")
    torch.testing.assert_close(logits(model, inputs), expected_logits(plain, inputs), **FLOAT)


def test_a_quantised_weight_of_another_layer_is_named() -> None:
    model = tiny_llava()
    norm = model.model.language_model.layers[2].input_layernorm
    norm.weight = nn.Parameter(Halves(norm.weight.detach() / 2), requires_grad=False)
    weight = norm.weight
    hidrop.compile(model, SCHEDULE, backend="eager")
    message = r"layers\.2\.input_layernorm\.weight is a Halves.*mul.*filter_fn"
    with pytest.raises(hidrop.CaptureError, match=message):
        logits(model, batch(model, ROWS))
    assert norm.weight is weight, "capture left its stand-in in the model"


# Subclasses that are not quantised.


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def check_refused(model: Any, message: str) -> None:
    before = dict(model.named_parameters())
    with pytest.raises(hidrop.UnsupportedModelError, match=message):
        hidrop.compile(model, SCHEDULE, backend="eager")
    assert not hidrop.is_compiled(model)
    assert "forward" not in model.__dict__
    assert all(p is before[name] for name, p in model.named_parameters())


def test_tensor_parallelism_outside_the_decoder_is_refused_too(mesh: Any) -> None:
    model = tiny_llava()
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    check_refused(
        model, r"^lm_head\.weight is a DTensor that neither fully_shard .* nor .*tp_plan made"
    )


def test_a_model_that_is_sharded_once_compiled_is_refused_at_the_call(mesh: Any) -> None:
    model = hidrop.compile(tiny_llava(), SCHEDULE, backend="eager")
    parallelize_module(
        model.model.language_model.layers[1], mesh, {"mlp.up_proj": ColwiseParallel()}
    )
    with pytest.raises(hidrop.UnsupportedModelError, match=r"^layers\.1\.mlp.* is a DTensor"):
        logits(model, batch(model, ROWS))


def test_a_subclass_with_no_product_of_its_own_is_named() -> None:
    model = tiny_llava()
    weight = model.model.language_model.layers[1].mlp.up_proj.weight.detach()
    model.model.language_model.layers[1].mlp.up_proj.weight = nn.Parameter(
        TwoTensor(weight, weight.clone()), requires_grad=False
    )
    check_refused(
        model,
        r"^layers\.1\.mlp\.up_proj\.weight of the text decoder is a \S+two_tensor\.TwoTensor, a tensor "
        r"subclass without a __torch_function__",
    )
