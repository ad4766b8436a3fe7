"""What a graph cannot hold is named before anything is traced, with what to do instead."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import prune
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import hidrop_fx as hidrop
from hidrop_fx.capture.admission import check_capturable
from hidrop_fx.capture.quantisers import METHODS, name_of_quantiser
from tests.support.models import tiny_llava

Change = Callable[[Any], Any]


@pytest.fixture
def decoder() -> Any:
    return tiny_llava("llama", num_layers=2).get_decoder()


def _first_fsdp() -> nn.Module:
    home = "torch.distributed.fsdp.fully_sharded_data_parallel"
    kind = type("FullyShardedDataParallel", (nn.Module,), {"__module__": home})
    module: nn.Module = kind()
    return module


@pytest.fixture
def own_attention() -> Iterator[Callable[..., Any]]:
    def attention(
        module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["own"] = attention
    yield attention
    del ALL_ATTENTION_FUNCTIONS["own"]


def _accelerate_hook(name: str, *args: Any, **kwargs: Any) -> Change:
    def put_in(decoder: Any) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(decoder.layers[1].mlp, getattr(hooks, name)(*args, **kwargs))

    return put_in


def _sequence_of_hooks(decoder: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    casting = hooks.LayerwiseCastingHook(torch.float16, torch.float32, False)
    hooks.add_hook_to_module(decoder.norm, hooks.SequentialHook(hooks.ModelHook(), casting))


def _context_parallel(decoder: Any) -> None:
    """As accelerate prepares a model with `ParallelismConfig(cp_size=2)`."""
    modeling = pytest.importorskip("accelerate.big_modeling")
    modeling._attach_context_parallel_hooks(decoder)


def _adapter_names_hook(decoder: Any) -> None:
    model = pytest.importorskip("peft.tuners.lora.model")
    hook = functools.partial(model._adapter_names_pre_forward_hook, adapter_names=["a", "b"])
    decoder.layers[0].mlp.up_proj.register_forward_pre_hook(hook, with_kwargs=True)


def _script(decoder: Any) -> None:
    decoder.layers[1].mlp.act_fn = torch.jit.script(nn.ReLU())


@pytest.mark.parametrize(
    ("put_in", "message"),
    [
        # hooks that write a weight anew
        (
            lambda d: nn.utils.weight_norm(d.layers[0].mlp.up_proj),
            r"layers\.0\.mlp\.up_proj .*WeightNorm.*parametrizations\.weight_norm",
        ),
        (
            lambda d: nn.utils.spectral_norm(d.layers[0].mlp.up_proj),
            r"layers\.0\.mlp\.up_proj .*SpectralNorm.*remove_spectral_norm",
        ),
        (
            lambda d: prune.l1_unstructured(d.layers[0].mlp.up_proj, "weight", 2),
            r"layers\.0\.mlp\.up_proj .*prune\.remove",
        ),
        # hooks of backward
        (
            lambda d: d.layers[1].register_full_backward_hook(lambda *_: None),
            r"layers\.1 .*backward hook .*lambda.*parameter\.register_hook",
        ),
        (
            lambda d: d.norm.register_full_backward_pre_hook(lambda *_: None),
            r"norm .*backward hook",
        ),
        (
            lambda d: d.layers[1].mlp.register_backward_hook(lambda *_: None),
            r"layers\.1\.mlp .*backward hook",
        ),
        # of PEFT, by row
        (_adapter_names_hook, r"layers\.0\.mlp\.up_proj .*adapter_names.*set_adapter"),
        # of accelerate
        (
            _accelerate_hook("LayerwiseCastingHook", torch.float16, torch.float32, False),
            r"layers\.1\.mlp .*LayerwiseCastingHook.*remove_hook_from_module",
        ),
        (_accelerate_hook("CpuOffload"), r"layers\.1\.mlp .*CpuOffload"),
        (_sequence_of_hooks, r"norm .*LayerwiseCastingHook"),
        # weights that are elsewhere
        (
            lambda d: d.layers[0].mlp.up_proj.to("meta"),
            r"layers\.0\.mlp\.up_proj\.weight .*meta device.*device_map",
        ),
        (
            lambda d: setattr(d.layers[0].mlp, "up_proj", nn.LazyLinear(64, bias=False)),
            r"layers\.0\.mlp\.up_proj\.weight .*no shape yet",
        ),
        # parts of a model, as stages of a pipeline have them
        (
            lambda d: setattr(d, "embed_tokens", None),
            r"the token embedding .*NoneType.*fully_shard",
        ),
        (lambda d: d.layers.__setitem__(1, nn.Identity()), r"layers\.1 .*Identity.*pipeline"),
        # context parallelism
        (_context_parallel, r"layers\.0\.self_attn .*context parallelism.*fully_shard"),
        # modules that are compiled, scripted, or recompute themselves
        (_script, r"layers\.1\.mlp\.act_fn .*TorchScript"),
        (
            lambda d: setattr(d.layers[0], "mlp", torch.compile(d.layers[0].mlp)),
            r"layers\.0\.mlp .*compiled by torch\.compile",
        ),
        (lambda d: d.layers[1].compile(), r"layers\.1 .*compiled by torch\.compile"),
        (
            lambda d: setattr(d.layers[1], "mlp", _first_fsdp()),
            r"layers\.1\.mlp .*FullyShardedDataParallel.*fsdp_version: 2",
        ),
    ],
)
def test_what_no_graph_holds_is_named(decoder: Any, put_in: Change, message: str) -> None:
    check_capturable(decoder, decoder)
    put_in(decoder)
    with pytest.raises(hidrop.HidropError, match=message):
        check_capturable(decoder, decoder)


def test_hooks_of_the_embedding_are_left_alone(decoder: Any) -> None:
    decoder.embed_tokens.register_full_backward_hook(lambda *_: None)
    check_capturable(decoder, decoder)


def test_a_backward_hook_of_all_modules_is_named(decoder: Any) -> None:
    handle = register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(hidrop.HidropError, match="backward hook of all modules"):
            check_capturable(decoder, decoder)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["own", "sdpa", "eager"])
def test_an_attention_of_ones_own_is_named(
    decoder: Any,
    own_attention: Callable[..., Any],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", own_attention)
    elif name == "sdpa":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own_attention)
    decoder.config._attn_implementation = name
    with pytest.raises(hidrop.HidropError, match=rf"attention '{name}' .*own_attention.*sdpa"):
        check_capturable(decoder, decoder)
    decoder.config._attn_implementation = "flash_attention_2"
    check_capturable(decoder, decoder)


def test_a_lowered_number_of_layers_is_named(decoder: Any) -> None:
    decoder.config.num_hidden_layers = 1
    with pytest.raises(hidrop.CaptureError, match=r"has 2 layers.*num_hidden_layers is 1.*\[:1\]"):
        check_capturable(decoder, decoder)


def test_compile_refuses_at_once_and_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_llava("llama", num_layers=1)
    prune.l1_unstructured(model.get_decoder().layers[0].mlp.up_proj, "weight", 2)
    before = dict(model.__dict__)
    with pytest.raises(hidrop.UnsupportedModelError, match=re.escape("prune.remove(module, name)")):
        hidrop.compile(model, "identity", backend="eager")
    assert dict(model.__dict__) == before


def test_every_quantiser_of_transformers_is_known() -> None:
    assert METHODS.keys() == AUTO_QUANTIZER_MAPPING.keys()


def _layer_of(module: str, name: str = "QuantLinear") -> nn.Module:
    kind = type(name, (nn.Module,), {"__module__": module})
    layer: nn.Module = kind()
    return layer


@pytest.mark.parametrize(
    ("layer", "quantiser"),
    [
        (_layer_of("gptqmodel.nn_modules.qlinear.torch"), "GPTQ"),
        (_layer_of("hqq.core.quantize", "HQQLinear"), "HQQ"),
        (_layer_of("aqlm.inference", "QuantizedLinear"), "AQLM"),
        (_layer_of("transformers.integrations.finegrained_fp8", "FP8Linear"), "fine-grained FP8"),
        (_layer_of("transformers.integrations.bitnet", "AutoBitLinear"), "BitNet"),
        (_layer_of("transformers.integrations.gguf.utils", "GgufLinear"), "GGUF"),
        (_layer_of("optimum.quanto.nn.qlinear", "QLinear"), "Quanto"),
    ],
)
def test_layers_of_quantisers_are_named(decoder: Any, layer: nn.Module, quantiser: str) -> None:
    assert name_of_quantiser(nn.Linear(1, 1)) is None
    decoder.layers[0].mlp.up_proj = layer
    with pytest.raises(
        hidrop.UnsupportedModelError,
        match=rf"layers\.0\.mlp\.up_proj .*{quantiser}.*TorchAoConfig",
    ):
        check_capturable(decoder, decoder)
