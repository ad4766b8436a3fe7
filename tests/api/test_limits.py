"""Every row of docs/limits.md is refused with its message, and whatever is refused has a row.

Over 400 lines: a case for each row of one table.
"""

from __future__ import annotations

import ast
import copy
import pickle
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

import hidrop_fx as hidrop
from hidrop_fx import errors
from hidrop_fx.distributed import agreement
from hidrop_fx.runtime.every_rank import check_schedule
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.api.test_bad_input import other_vlm, recurrent_backbone, text_model
from tests.support.backbones import tiny_backbone
from tests.support.divided import divide, one_of_two
from tests.support.families import CASES as FAMILIES
from tests.support.families import IMAGE as FAMILY_IMAGE
from tests.support.families import VIDEO as FAMILY_VIDEO
from tests.support.families import make_batch
from tests.support.models import IMAGE, IMAGE_TOKEN, PRUNED, Make, batch, tiny_llava
from tests.support.sharded import one_process
from tests.support.towers import sized_batch, tiny_tower
from tests.support.weights import Halves

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "limits.md"
ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8], [8, IMAGE, 9]]

# The parts of the package that meet a user's model and calls, and whose refusals the page lists.
REFUSING = ("api.py", "capture", "lowering", "models", "ops", "runtime", "surroundings.py")
REFUSING += ("distributed", "inspection/heatmaps", "training/ratios.py")
# Mistakes in what is passed, as distinct from what Hugging Face's model would take.
MISTAKES = (
    "dtype_bytes=...: a program is made in 16 bits",
    "no model can be made from a ...",
    "before=...: ...",
    "before=... returned ...",
    "... reads modules[",
    "before=... runs a trained classifier",
    "before=... merges the tokens of each frame, and the position ids",
    "copies=... does not divide the dimensions",
    "modules=",
    "modules has ...",
    "modules[...] is a ",
    "modules['classifier'] ",
    "schedule is a ",
    "modules=...: pass a dictionary",
    "modules has ..., which no schedule reads",
    "modules[...] is a ...",
    "modules[...] is empty",
    "... is a ..., the model's layers are ...",
    "... is ... on ..., the model's layers are ...",
    "... is ..., that of the model's own layer ...",
    "the model has no side branch",
    "a branch of layers=... from layer=... on needs",
    "this model was compiled without a side branch",
    "the layers of the branch were made for places",
    "schedules={} names none",
    "the schedule's name ... is no name",
    "the name ... is that of a preset",
    "score=... takes the best ... heads",
    "in the schedule ...: ",
    "... is no schedule of this model",
    # tests/training/test_dual.py
    "share=... is no share of the steps",
    "distill=... is none of",
    "temperature=... divides the logits",
    "weight=... is no weight",
    "number=... is no number of an optimizer step",
    "fast=... and full=... are one schedule",
    "... learns, and must be known when an optimizer is made",
    "pass exactly one of input_ids and inputs_embeds",
    "input_ids has shape ",
    "row ... has ... ... placeholder tokens",
    "... cannot encode ... without one of",
    "image features are ... wide",
    "text features are ",
    "attention_mask has shape ...; with this cache it must cover",
    "... has shape ...; it must be that of the tokens",
    "... is trained with ",
    "labels have shape ",
    "... came with an attention_mask: a row of one sample",
    "... came with a cache that holds a prompt: rows of a cache",
    "...=... and ...=... differ",
    "...=... must ascend from 0",
    "position_ids start anew at column ...",
    "pass either ... or mm_encoder_outputs",
    "an output of this model's encoder has deepstack_features",
    "the call has ... rows, its cache ",
    "crop(...)",
    "shapes has ",
    "...: every image of this model has ",
    "this ... is not compiled",
    "rank ... ..., and rank ... runs ",
    "the learned ratios are in ...",
    "dtype=",
    "device=",
    # tests/distributed/cases.py, `wrapped`.
    "process ... of this machine has no GPU",
    "...; so process ... ends, too",
    "there is no process group to shard over",
    "this ... is sharded already",
    "group_shallow=",
    "costs= ",
    "no image file ",
    "cannot load ",
    "leave ... out of the prompt",
    "... is not an image that Pillow can read",
    "attention='flash_attn' needs the flash-attn package",
    "the schedule ... never prunes",
    "there is no image in these inputs",
    "heat maps need input_ids",
    "a hidrop_fx cache is filled by its own programs",
    "... of the cache is not where the ",
    # No class that transformers ships.
    "...forward makes its logits in a way",
    # Files of compiled code.
    "nothing is compiled yet",
    "PyTorch recorded no compiled code",
    "... is a directory",
    "... has format ",
    "... is no directory",
    "... does not exist",
    "... is damaged",
    "... was saved with ",
    "PyTorch cannot read the code in ",
    # Decoders of a structure of their own: tests/capture/test_regions.py, on graphs made by hand.
    "the captured graph reads ",
    "the captured graph writes in place",
    "the captured graph holds no node of ",
    "... must hand on one value",
    "... does not read the hidden states of the layer before it",
    "... holds ... attentions, not one",
    "... reads the size ... from outside",
    "... reads ... = ..., which is neither the batch size",
)


class Models:
    """What cases are made from."""

    def __init__(self, compiled: Make) -> None:
        self.compiled = compiled()
        self.inputs = batch(self.compiled, ROWS)

    def call(self, **changes: Any) -> Any:
        """Call the model that all cases share; None takes an input away."""
        given = {k: v for k, v in (self.inputs | changes).items() if v is not None}
        return self.compiled(**given)

    def generate(self, **changes: Any) -> Any:
        return self.compiled.generate(**(self.inputs | changes), max_new_tokens=2)

    def cache(self) -> Any:
        with torch.no_grad():
            return self.call().past_key_values


Case = Callable[[Models], object]
CASES: dict[str, Case] = {}


def case(row: str) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        assert row not in CASES, f"two cases for {row!r}"
        CASES[row] = function
        return function

    return register


def compiling(model: Any, schedule: str = "exit=1", **options: Any) -> Any:
    return hidrop.compile(model, schedule, backend="eager", **options)


def called(model: Any, rows: Any = ROWS, **changes: Any) -> Any:
    return model(**batch(model, rows), **changes)


# Models.


@case("cross-attention to images (Mllama)")
def _(models: Models) -> None:
    compiling(other_vlm())


@case("Gemma 4 with embeddings of its layers' own (E2B, E4B), or with shared keys and values")
def _(models: Models) -> None:
    model = FAMILIES["gemma4"].make()
    model.config.text_config.hidden_size_per_layer_input = 4
    compiling(model)


@case("encoder-decoders")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    model.config.is_encoder_decoder = True
    compiling(model)


@case("query tokens (BLIP-2), heads under another name")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    model.head = model.lm_head
    del model.lm_head
    compiling(model)


@case("a decoder that is no model of its own")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    model.get_decoder = lambda: model.model
    compiling(model)


class Louder(LlavaModel):
    """Scales what it hands to its decoder."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = inputs_embeds * 2
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class Hidden(LlavaModel):
    """Shows no decoder."""

    def forward(self, pixel_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(pixel_values=pixel_values, **kwargs)


class Switched(LlavaModel):
    """Has an argument that no other class has."""

    def forward(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        switch: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if switch:
            print("switched on")
        inputs_embeds = self.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


def with_base(cls: type) -> Any:
    model = tiny_llava(num_layers=1)
    model.model.__class__ = cls
    return model


@case("a class that does more than put features at their places")
def _(models: Models) -> None:
    compiling(with_base(Louder))


@case("a base model without a decoder that is known by name")
def _(models: Models) -> None:
    compiling(with_base(Hidden))


@case("an argument that only the class's own forward reads")
def _(models: Models) -> None:
    model = compiling(with_base(Switched))
    model(input_ids=torch.tensor([[5, 6]]), switch=True)


@case("a text model")
def _(models: Models) -> None:
    compiling(text_model())


@case("a base model, a module, a pipeline")
def _(models: Models) -> None:
    compiling(tiny_llava(num_layers=1).model)


@case("a class that overrides `forward`")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    own = {"forward": lambda self, **inputs: LlavaForConditionalGeneration.forward(self, **inputs)}
    model.__class__ = type("OwnLlava", (LlavaForConditionalGeneration,), own)
    compiling(model)


class Wrapper(nn.Module):
    """Holds the model under a name of its own."""

    get_base_model = None


@case("`compile` of a shallow copy beside its original")
def _(models: Models) -> None:
    compiling(copy.copy(compiling(tiny_llava(num_layers=2))))


@case("`nn.DataParallel` on several GPUs")
def _(models: Models) -> None:
    models.compiled._replicate_for_data_parallel()


@case("a wrapper")
def _(models: Models) -> None:
    compiling(Wrapper())


@case(
    "layers with a recurrent state of another kind than the gated delta rule, Mamba and Mamba-2 (MiniMax, Kimi Linear, GLM 5 Next)"
)
def _(models: Models) -> None:
    compiling(recurrent_backbone())


@case("layers that read the embeddings again (Zamba, Zamba2)")
def _(models: Models) -> None:
    compiling(tiny_backbone("zamba2"))


@case("a text model set to be an encoder (`use_bidirectional_attention`)")
def _(models: Models) -> None:
    model = tiny_backbone("gemma3_text")
    model.config.get_text_config().use_bidirectional_attention = True
    compiling(model)


@case("a decoder with masks by layer type, and no layer types")
def _(models: Models) -> None:
    model = tiny_llava("qwen2", num_layers=2)
    model.config.get_text_config().layer_types = None
    compiling(model)


@case("a decoder whose source is not to be found")
def _(models: Models) -> None:
    made: dict[str, Any] = {}
    exec("def forward(self, inputs_embeds=None, **kwargs): ...", made)
    model = tiny_llava(num_layers=1)
    decoder = model.get_decoder()
    decoder.__class__ = type("Made", (type(decoder),), {"forward": made["forward"]})
    compiling(model)


def with_forward(path: str, around: Callable[[Any], Any]) -> Any:
    """Call a compiled model of which a module of the decoder has another forward."""
    model = tiny_llava(num_layers=2)
    module = model.get_decoder().get_submodule(path)
    module.forward = around(module.forward)
    return called(compiling(model))


@case("a decoder that mixes tokens before its layers")
def _(models: Models) -> None:
    def around(forward: Any) -> Any:
        def mixing(
            inputs_embeds: Any = None,
            position_ids: Any = None,
            attention_mask: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return forward(
                inputs_embeds=inputs_embeds - inputs_embeds.mean(dim=1, keepdim=True),
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=use_cache,
            )

        return mixing

    with_forward("", around)


@case("layers that change the attention mask")
def _(models: Models) -> None:
    def around(forward: Any) -> Any:
        return lambda *args, attention_mask, **kwargs: forward(
            *args, attention_mask=attention_mask & attention_mask, **kwargs
        )

    with_forward("layers.0.self_attn", around)


@case("layers of different windows under one mask")
def _(models: Models) -> None:
    model = tiny_backbone("gemma2")
    model.get_decoder().layers[3].self_attn.sliding_window = 3
    called(compiling(model))


@case("a decoder layer that `device_map` puts on several devices")
def _(models: Models) -> None:
    with_offloading(torch.device("meta"))  # for the lack of a second device that is everywhere


@case("quantised weights in a decoder that accelerate offloads in part")
def _(models: Models) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with_offloading(
        torch.device("cpu"),
        lambda d: quantize_(d.layers[1].mlp.down_proj, Int8WeightOnlyConfig()),
    )


@case(
    "pipeline parallelism (`torch.distributed.pipelining`, accelerate's `prepare_pippy`, transformers' `pp_size`)"
)
def _(models: Models) -> None:
    with_change(lambda d: d.layers.__setitem__(1, nn.Identity()), layers=2)


@case("context parallelism set up on the layers (accelerate's `cp_size`)")
def _(models: Models) -> None:
    modeling = pytest.importorskip("accelerate.big_modeling")
    with_change(modeling._attach_context_parallel_hooks)


LAYERS = "model.language_model.layers.*"


@case("tensor parallelism of MLA, of attention sinks, or by another style of its own")
def _(models: Models) -> None:
    with one_of_two():
        compiling(divide(tiny_llava(num_layers=1), {f"{LAYERS}.mlp": "all_reduce"}))


@case(
    "tensor parallelism over more processes than KV heads, or another number that does not divide them"
)
def _(models: Models) -> None:
    with one_of_two():
        compiling(divide(tiny_llava(num_layers=1, kv_heads=1)))


@case("quantised weights under tensor parallelism")
def _(models: Models) -> None:
    with one_of_two():
        model = divide(tiny_llava(num_layers=1))
        model.get_decoder().layers[0].mlp.up_proj._hf_quantized_needs_local_tp = True
        compiling(model)


@case("PEFT's adapters in a decoder that tensor parallelism divides")
def _(models: Models) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    with one_of_two():
        model = divide(tiny_llava(num_layers=1))
        mlp = model.get_decoder().layers[0].mlp
        mlp.up_proj = Linear(mlp.up_proj, "default", config=LoraConfig(r=2), r=2)
        compiling(model)


@case("training under a `tp_plan` that divides heads, and not the norms of heads")
def _(models: Models) -> None:
    with one_of_two():
        plan = {f"{LAYERS}.self_attn.q_norm": "replicate"}
        model = compiling(divide(tiny_llava("qwen3", num_layers=1), plan))
        runtime = runtime_of(model)
        assert runtime is not None
        with torch.no_grad():
            runtime.programs.capture()  # for answers it is right
        runtime.programs.capture()


@case('`score="random"` under a `tp_plan` that divides nothing of the decoder')
def _(models: Models) -> None:
    with one_of_two():
        model = tiny_llava(num_layers=1)
        model.model._tp_plan = {}
        called(compiling(divide(model), "prune=0:2,score=random"))


@case("`before=...` over a vision tower that tensor parallelism divides")
def _(models: Models) -> None:
    with one_of_two():
        plan = {"model.vision_tower.encoder.layers.*.mlp.fc1": "colwise_gather_output"}
        model = compiling(divide(tiny_llava(num_layers=1), plan), "before=divprune(ratio=0.5)")
        called(model)


@case(
    "`hidrop.compare` with a plain loop, `heatmap`, `replay` and `calibrate` under tensor parallelism"
)
def _(models: Models) -> None:
    with one_of_two():
        model = compiling(divide(tiny_llava(num_layers=1)))
        hidrop.compare(model, **batch(model, ROWS))


@case(
    "distributed tensors that neither FSDP2 nor transformers' tensor parallelism made (`parallelize_module`)"
)
def _(models: Models) -> None:
    from torch.distributed.tensor import distribute_tensor

    with one_process("tp") as mesh:
        model = tiny_llava(num_layers=1)
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
        compiling(model)


@case("FSDP2 over weights that tensor parallelism split already")
def _(models: Models) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    with one_process("data", "tp") as mesh:
        model = tiny_llava(num_layers=1)
        layer = model.get_decoder().layers[0]
        parallelize_module(layer, mesh["tp"], {"mlp.up_proj": ColwiseParallel()})
        for each in (layer, model):
            fully_shard(each, mesh=mesh["data"])
        called(compiling(model))


@case(
    "FSDP2 on modules that a compiled model does not call: those inside a decoder layer, the decoder itself; on a tower whose hidden states are the features"
)
def _(models: Models) -> None:
    with one_process("data") as mesh:
        model = tiny_llava(num_layers=1)
        fully_shard(model.get_decoder().layers[0].self_attn, mesh=mesh)
        compiling(model)


@case("FSDP2 of a text decoder with quantised weights")
def _(models: Models) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with one_process("data") as mesh:
        model = tiny_llava(num_layers=1)
        layer = model.get_decoder().layers[0]
        fully_shard(layer, mesh=mesh, ignored_params=set(layer.mlp.parameters()))
        quantize_(layer.mlp, Int8WeightOnlyConfig())
        compiling(model)


@case("a pass that lets a layer read what a later one computes, under FSDP2")
def _(models: Models) -> None:
    def ahead(program: Any, plan: Any) -> Any:
        graph = program.graph
        weight = next(n for n in graph.nodes if str(n.target) == "layers.1.input_layernorm.weight")
        region = program.regions[0]
        with graph.inserting_before(region.nodes[0]):
            early = graph.node_copy(weight)
            scaled = program.call(torch.mul, region.hidden, early, before=region.nodes[0])
        region.read(region.hidden, scaled)
        region.hidden = scaled
        return hidrop.PassResult(matched=1)

    with one_process("data") as mesh:
        model = tiny_llava(num_layers=2)
        for each in (*model.get_decoder().layers, model):
            fully_shard(each, mesh=mesh)
        called(compiling(model, "inject=0", passes=[ahead]))


def sharded(mesh: Any, schedule: str = "exit=1", **options: Any) -> Any:
    model = compiling(tiny_llava(num_layers=2), schedule)
    for each in (*model.get_decoder().layers, model):
        fully_shard(each, mesh=mesh, **options)
    return model


@case(
    "`model.forward(...)`, `hidrop.warmup` and other calls past the module that FSDP2 shards as a whole"
)
def _(models: Models) -> None:
    with one_process("data") as mesh:
        model = sharded(mesh)
        model.forward(**batch(model, ROWS))


@case("the same under ZeRO-3, or before `deepspeed.initialize`")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), PRUNED)
    for number, parameter in enumerate(model.get_decoder().parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = parameter.data.new_empty(0)
    model(**batch(model, ROWS))


@case("a schedule that reads a module of its own (`twigvlm`, `index-preserving`) under ZeRO-3")
def _(models: Models) -> None:
    check_schedule(hidrop.Schedule.parse("inject=0,prune=1:3,score=twig"), partitioned=True)


@case("`hidrop.load` of learned ratios under ZeRO-3, behind `deepspeed.initialize`")
def _(models: Models) -> None:
    ratios = compiling(tiny_llava(), PRUNED + ",selection=dtopk").hidrop_ratios
    ratios.values.ds_id, ratios.values._z3_optimizer = 0, None
    ratios.set(ratios.layers[0], torch.tensor(0.9))


class Others:
    """A mesh of two processes, of which this one is the first."""

    device_type = "cpu"
    mesh = torch.arange(2)


@case("processes that shard a model and run different schedules")
def _(models: Models) -> None:
    import torch.distributed as dist

    with one_process("data"), patch.object(agreement, "_counters", {(0, 1): iter([0])}):
        dist.distributed_c10d._get_default_store().set("hidrop_fx/schedule/0,1/0/1", "exit=2")
        agreement.check_agreement(Others, "exit=1")


@case("a schedule in one of the processes alone")
def _(models: Models) -> None:
    with one_process("data"):
        agreement.check_agreement(Others, "exit=1", wait_seconds=0.1)


@case("FSDP2 or ZeRO-3, a batch without an image, and a model of which no blank image is known")
def _(models: Models) -> None:
    with one_process("data") as mesh:
        model = sharded(mesh).train()
        model.config.vision_config.image_size = None
        called(model, [[5, 6, 7]])


@case(
    "processes of which some change the schedule, by `hidrop.use` or `hidrop_schedule`, and others do not"
)
def _(models: Models) -> None:
    with one_process("data"):
        agreement.check_agreement(Others, "exit=1", changes=True, wait_seconds=0.1)


@case("learned ratios that FSDP2 or ZeRO-3 shards, saved by one process alone")
def _(models: Models) -> None:
    with one_process("data"):
        model = compiling(tiny_llava(num_layers=2), "prune=0:2,selection=dtopk")
        model.hidrop_ratios.__dict__["_sharded"] = Parted()
        with patch.object(agreement, "WAIT_SECONDS", 0.1):
            model.save_pretrained("unwritten")


class Parted(Others):
    """Ratios of which another process holds a part."""

    device_mesh = Others


@case("assisted decoding and prompt lookup under FSDP2 and ZeRO-3")
def _(models: Models) -> None:
    with one_process("data") as mesh:
        model = sharded(mesh)
        model.generate(**batch(model, ROWS), max_new_tokens=2, prompt_lookup_num_tokens=2)


@case("dynamic (InternVL3) and longrope RoPE")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    model.get_decoder().rotary_emb.rope_type = "dynamic"
    compiling(model)


@case("4-bit layers of bitsandbytes that no device has packed yet")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.get_decoder().layers[0].mlp.up_proj = kind(32, 64, bias=False)
    compiling(model)


@case("8-bit layers of bitsandbytes in the text decoder")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    kind = type("Linear8bitLt", (nn.Linear,), {})
    model.get_decoder().layers[0].mlp.up_proj = kind(32, 64, bias=False)
    compiling(model)


def with_weight(wrap: Callable[[torch.Tensor], torch.Tensor], path: str) -> Any:
    model = tiny_llava(num_layers=1)
    module = model.get_decoder().layers[0].get_submodule(path)
    module.weight = nn.Parameter(wrap(module.weight.detach()), requires_grad=False)
    return model


def with_change(change: Callable[[Any], object], layers: int = 1) -> Any:
    """Compile a model whose decoder was changed."""
    model = tiny_llava(num_layers=layers)
    change(model.get_decoder())
    return compiling(model, "identity")


def with_offloading(
    device: torch.device, change: Callable[[Any], object] = lambda d: None, **options: Any
) -> Any:
    """Compile a model of two layers, of one of which accelerate offloads a part."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_llava(num_layers=2)
    part = model.get_decoder().layers[0].mlp.up_proj
    hooks.add_hook_to_module(part, hooks.AlignDevicesHook(device, offload=True))
    change(model.get_decoder())
    return compiling(model, **options)


def with_adapter(config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    return compiling(peft.get_peft_model(tiny_llava(num_layers=1), config(peft)), "identity")


class Own(nn.Module):
    """A layer around another, with code of one's own behind it."""

    def __init__(self, inner: nn.Module, then: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.then = inner, then

    def forward(self, x: torch.Tensor) -> Any:
        return self.then(self.inner(x))


def with_code(then: Callable[[Any], Any]) -> Any:
    def wrap(decoder: Any) -> None:
        decoder.layers[0].mlp = Own(decoder.layers[0].mlp, then)

    return called(with_change(wrap))


@case("layers of other quantisers than torchao, all those of transformers")
def _(models: Models) -> None:
    kind = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})
    with_change(lambda d: setattr(d.layers[0].mlp, "up_proj", kind()))


@case(
    "adapters of PEFT that see more than a token (Lily, aLoRA), need tasks (Poly) or build sparse matrices "
    "(FRoD, SHiRA); in training LoHa and LoKr with dropout of whole adapters, VeLoRA, MonteCLoRA"
)
def _(models: Models) -> None:
    with_adapter(lambda peft: peft.PolyConfig(r=4, target_modules=r".*language_model.*q_proj"))


@case("adapters by row (`adapter_names`); `torch.nn.utils.weight_norm`, `spectral_norm`, `prune`")
def _(models: Models) -> None:
    with_change(lambda d: nn.utils.weight_norm(d.layers[0].mlp.up_proj))


@case("backward hooks inside the text decoder")
def _(models: Models) -> None:
    with_change(lambda d: d.layers[0].register_full_backward_hook(lambda *_: None))


@case("backward hooks of all modules")
def _(models: Models) -> None:
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        compiling(tiny_llava(num_layers=1))
    finally:
        handle.remove()


@case("accelerate's `cpu_offload_with_hook` and layerwise casting inside the decoder")
def _(models: Models) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    with_change(lambda d: hooks.add_hook_to_module(d.layers[0].mlp, hooks.CpuOffload()))


@case("weights on the meta device that no hook of accelerate loads")
def _(models: Models) -> None:
    with_change(lambda d: d.layers[0].mlp.to("meta"))


@case("lazy modules that were never called")
def _(models: Models) -> None:
    with_change(lambda d: setattr(d.layers[0].mlp, "up_proj", nn.LazyLinear(64, bias=False)))


@case("TorchScript in the text decoder")
def _(models: Models) -> None:
    with_change(lambda d: setattr(d.layers[0].mlp, "act_fn", torch.jit.script(nn.SiLU())))


@case("layers compiled by `torch.compile` themselves")
def _(models: Models) -> None:
    with_change(lambda d: d.layers[0].compile())


@case("FSDP (the first)")
def _(models: Models) -> None:
    home = "torch.distributed.fsdp.fully_sharded_data_parallel"
    kind = type("FullyShardedDataParallel", (nn.Module,), {"__module__": home})
    with_change(lambda d: setattr(d.layers[0], "mlp", kind()))


@case("an attention function of one's own")
def _(models: Models) -> None:
    ALL_ATTENTION_FUNCTIONS["own"] = lambda *args, **kwargs: None
    try:
        with_change(lambda d: setattr(d.config, "_attn_implementation", "own"))
    finally:
        del ALL_ATTENTION_FUNCTIONS["own"]


@case("layers that compute one value of several tokens outside attention")
def _(models: Models) -> None:
    with_code(lambda x: x + x.mean(dim=1, keepdim=True))


@case("convolutions over tokens, but causal ones of each channel for itself")
def _(models: Models) -> None:
    kernel = torch.ones(32, 1, 3)
    with_code(lambda x: x + nn.functional.conv1d(x.mT, kernel, padding=1, groups=32).mT)


@case("layers that build sparse tensors")
def _(models: Models) -> None:
    with_code(lambda x: x + torch.eye(32).to_sparse().sum())


@case("layers that write to their buffers, as `parametrizations.spectral_norm` does in training")
def _(models: Models) -> None:
    model = with_change(lambda d: nn.utils.parametrizations.spectral_norm(d.layers[0].mlp.up_proj))
    called(model.train(), labels=None)


@case(
    "a backward of one's own (`torch.autograd.Function`), or `torch.no_grad()`, in a layer, where gradients are "
    "enabled"
)
def _(models: Models) -> None:
    with_code(torch.no_grad()(lambda x: x * 1))


@case("`config.num_hidden_layers` that is not the number of layers")
def _(models: Models) -> None:
    with_change(lambda d: setattr(d.config, "num_hidden_layers", 1), layers=2)


@case("another number of layers than when the model was compiled")
def _(models: Models) -> None:
    model = compiling(tiny_llava(num_layers=2))
    model.get_decoder().layers = model.get_decoder().layers[:1]
    model.config.text_config.num_hidden_layers = 1
    called(model)


@case("other tensor subclasses in it")
def _(models: Models) -> None:
    compiling(with_weight(lambda weight: TwoTensor(weight, weight.clone()), "mlp.up_proj"))


@case("quantised weights of other than linear layers in it")
def _(models: Models) -> None:
    called(compiling(with_weight(lambda weight: Halves(weight / 2), "input_layernorm")))


@case("code of the decoder that depends on values")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    mlp = model.get_decoder().layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) if x.sum() > 0 else original(-x)
    called(compiling(model))


@case("attention with arguments of its own")
def _(models: Models) -> None:
    model = tiny_llava(num_layers=1)
    attention = model.get_decoder().layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, weight_of_mine=30.0, **kwargs)
    called(compiling(model))


@case("a decoder without a list of its layers")
def _(models: Models) -> None:
    model = compiling(tiny_llava(num_layers=2))
    decoder = model.get_decoder()
    decoder.layers = nn.Sequential(*decoder.layers)
    called(model)


@case('`attention="varlen"`, `"flash_attn"` on a CPU, or in 32 bits')
def _(models: Models) -> None:
    compiling(tiny_llava(num_layers=1), attention="varlen")


@case('`selection="dtopk"` that starts from counts, where images vary in size')
def _(models: Models) -> None:
    compiling(tiny_tower("pixtral"), PRUNED + ",selection=dtopk")


@case('`positions="compact"`, `"group"` where position ids have three axes')
def _(models: Models) -> None:
    compiling(FAMILIES["qwen2_vl"].make(), "inject=1,positions=compact")


@case('`before="visionzip(...)"` where the tower or the projector is not like LLaVA\'s')
def _(models: Models) -> None:
    compiling(FAMILIES["qwen2_vl"].make(), "before=visionzip(dominant=2,contextual=1)")


@case("`ppe` where position ids have one axis")
def _(models: Models) -> None:
    compiling(tiny_llava(), "ppe")


@case("`ppe` where RoPE does not turn each dimension by one axis")
def _(models: Models) -> None:
    model = FAMILIES["qwen2_vl"].make()
    rope = model.get_decoder().rotary_emb
    rope.forward = lambda states, ids: (torch.ones(1, 3, 8), torch.ones(1, 3, 8))
    compiling(model, "ppe")


@case("`index-preserving` where the tower is not like Qwen2.5-VL's")
def _(models: Models) -> None:
    compiling(FAMILIES["qwen2_vl"].make(), "index-preserving")


@case(
    "`before=...` where a model has more of an image than its features: deepstack, masks by image"
)
def _(models: Models) -> None:
    compiling(FAMILIES["gemma3"].make(), "before=divprune(ratio=0.5)")


@case("`reads=...` where a model has more of an image than its features: deepstack, masks by image")
def _(models: Models) -> None:
    compiling(FAMILIES["gemma3"].make(), "reads=0")


@case(
    "`cache=...` or `bottleneck=...` over layers with short convolutions (LFM2) or recurrent states (Qwen3.5, Mamba)"
)
def _(models: Models) -> None:
    compiling(tiny_backbone("lfm2"), "bottleneck=5")


@case("`bottleneck=...` that is no word of the model")
def _(models: Models) -> None:
    compiling(tiny_llava(), "voco(token_id=32000)")


@case("`bottleneck=...` that is the place of an image")
def _(models: Models) -> None:
    compiling(tiny_llava(), f"bottleneck={IMAGE_TOKEN}")


@case("`inputs_embeds` under `bottleneck=...`")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), "bottleneck=5")
    model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[3, 5, 4]])))


@case("`reads=...` at layers with short convolutions (LFM2) or recurrent states (Qwen3.5, Mamba)")
def _(models: Models) -> None:
    compiling(tiny_backbone("lfm2"), "reads=3")


@case(
    "pruning by attention at a layer with a short convolution (LFM2), a recurrent state alone (Qwen3.5, Mamba) or an MLP alone (Nemotron-H)"
)
def _(models: Models) -> None:
    compiling(tiny_backbone("qwen3_5_text"), "prune=3:2")


@case("a gated delta rule or state space with arguments of its own")
def _(models: Models) -> None:
    model = tiny_backbone("qwen3_5_text")
    mixer = model.get_decoder().layers[0].linear_attn

    def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        rule = (
            torch_chunk_gated_delta_rule
            if hidden_states.dim()
            else torch_recurrent_gated_delta_rule
        )
        return rule(*[hidden_states] * 5, seq_idx=1)

    mixer.forward = types.MethodType(forward, mixer)
    called(compiling(model))


@case("assisted decoding and prompt lookup where layers carry a recurrent state (Qwen3.5, Mamba)")
def _(models: Models) -> None:
    model = compiling(tiny_backbone("qwen3_5_text"))
    model.generate(**batch(model, ROWS), max_new_tokens=3, prompt_lookup_num_tokens=2)


@case("cropping such a cache, or hiding tokens behind the prompt that it has seen")
def _(models: Models) -> None:
    model = compiling(tiny_backbone("qwen3_5_text"))
    cache = called(model).past_key_values
    model(input_ids=torch.tensor([[5]] * len(ROWS)), past_key_values=cache)
    cache.crop(-1)


@case("a call behind one that failed on such a cache while it ran")
def _(models: Models) -> None:
    model = compiling(tiny_backbone("qwen3_5_text"))
    cache = called(model).past_key_values
    cache.torn = True
    model(input_ids=torch.tensor([[5]] * len(ROWS)), past_key_values=cache)


@case('`score="twig"` where a model adds features to vision tokens between its layers')
def _(models: Models) -> None:
    model = FAMILIES["qwen3_vl"].make()
    twig = hidrop.grow_twig(model, 1, layer=1)
    compiling(model, "twigvlm(layer=1,average=2,exit=2)", modules={"twig": twig})


@case('`sparsevlm(version="v2")` where RoPE\'s tables hold each angle once (GPT-OSS)')
def _(models: Models) -> None:
    compiling(tiny_backbone("gpt_oss"), "sparsevlm(layers=(2,),keeps=(3,),version='v2',heads=2)")


@case("`mm_encoder_outputs`, or an assistant in `generate`, where a reducer reads the vision tower")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), "before=visionzip(dominant=2,contextual=1)")
    given = batch(model, ROWS)
    output = model.model.get_image_features(given.pop("pixel_values"), return_dict=True)
    model(**given, mm_encoder_outputs={"image": output})


@case("images in tiles where a reducer reads the vision tower (LLaVA-NeXT)")
def _(models: Models) -> None:
    case = FAMILIES["llava_next"]
    model = compiling(case.make(), "before=visionzip(dominant=2,contextual=1)")
    model(**make_batch(case, model, [[5, FAMILY_IMAGE, 6]]).inputs)


@case("features of as many tower layers as the decoder has layers (Qwen3-VL, cut short)")
def _(models: Models) -> None:
    model = FAMILIES["qwen3_vl"].make()
    decoder = model.get_decoder()
    decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:2], 2
    compiling(model)


@case('`deepstack="skip"` where an image is what is added on the way (Granite 4 Vision)')
def _(models: Models) -> None:
    compiling(FAMILIES["granite4_vision"].make(), "inject=1,deepstack=skip")


@case(
    '`per="tile"`, `"frame"` where an encoder joins them to one piece (LLaVA-NeXT, LLaVA-OneVision)'
)
def _(models: Models) -> None:
    compiling(FAMILIES["llava_next"].make(), "prune=1:2,per=tile")


@case(
    "`merge=...` where a model adds features to vision tokens between its layers, or masks by image"
)
def _(models: Models) -> None:
    compiling(FAMILIES["qwen3_vl"].make(), "prune=1:2,merge=nearest_key")


# Calls.


@case('`per="frame"` without the position ids of time, height and width')
def _(models: Models) -> None:
    case = FAMILIES["qwen2_vl"]
    model = case.make()
    given = make_batch(case, model, [[5, FAMILY_VIDEO, 6]]).inputs
    ids = torch.arange(given["input_ids"].shape[1])[None]
    compiling(model, "prune=1:2,per=frame")(**given, position_ids=ids)


def by_embeddings(name: str) -> Any:
    """Call a compiled model of a class with the embeddings of a prompt that has an image."""
    case = FAMILIES[name]
    model = case.make()
    given = make_batch(case, model, [[5, FAMILY_IMAGE, 6]]).inputs
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    return compiling(model)(**given)


@case("`inputs_embeds` where a class embeds some tokens in its own way (Ovis2)")
def _(models: Models) -> None:
    by_embeddings("ovis2")


@case("`inputs_embeds` where tiles are told apart by their names (Idefics 3)")
def _(models: Models) -> None:
    by_embeddings("idefics3")


@case("images and videos in one call, where both have one placeholder (GLM-4V)")
def _(models: Models) -> None:
    case = FAMILIES["glm4v"]
    model = case.make()
    given = make_batch(case, model, [[5, FAMILY_IMAGE, 6]]).inputs
    given["pixel_values_videos"] = given["pixel_values"]
    given["video_grid_thw"] = given["image_grid_thw"]
    compiling(model)(**given)


@case("`output_attentions`")
def _(models: Models) -> None:
    models.call(output_attentions=True)


@case("a loss over the routers of experts (`output_router_logits`, in the call or in the config)")
def _(models: Models) -> None:
    case = FAMILIES["qwen3_vl_moe"]
    model = case.make()
    model.config.text_config.output_router_logits = True
    compiling(model)(**make_batch(case, model, [[5, FAMILY_IMAGE, 6]]).inputs)


@case("a mask of four dimensions")
def _(models: Models) -> None:
    length = models.inputs["input_ids"].shape[1]
    models.call(attention_mask=torch.ones(2, 1, length, length).tril())


@case("`position_ids` of other tokens, or of axes that a class does not have")
def _(models: Models) -> None:
    rows, length = models.inputs["input_ids"].shape
    models.call(position_ids=torch.arange(length).expand(3, rows, -1))


@case("packed sequences with a cache")
def _(models: Models) -> None:
    length = models.inputs["input_ids"].shape[1]
    places = torch.arange(length)
    places[-2:] = torch.arange(2)
    models.call(attention_mask=None, position_ids=places.expand(2, -1))


@case("packed `position_ids` [B, N] where a class has several axes (Qwen2.5-VL)")
def _(models: Models) -> None:
    model = compiling(FAMILIES["qwen2_5_vl"].make())
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


@case("labels on padding")
def _(models: Models) -> None:
    models.call(labels=models.inputs["input_ids"])


@case('a shape that was not warmed up, with `on_new_shape="error"`')
def _(models: Models) -> None:
    model = hidrop.compile(
        tiny_llava(num_layers=2), "exit=1", backend="aot_eager", on_new_shape="error"
    )
    called(model)


@case("transforms of `torch.func` around a call")
def _(models: Models) -> None:
    weight = models.compiled.lm_head.weight
    torch.func.grad(lambda scale: models.call().logits.sum() * scale.sum())(weight.detach())


@case("parameters given for one call (`torch.func.functional_call`)")
def _(models: Models) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    given = {name: models.compiled.get_parameter(name).detach() * 2}
    torch.func.functional_call(models.compiled, given, args=(), kwargs=models.inputs)


@case("a second backward through one forward, with CUDA graphs")
def _(models: Models) -> None:
    model: Any = hidrop.compile(
        tiny_llava(num_layers=2), "exit=1", backend="eager", cuda_graphs=True
    )
    loss = called(model, use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    loss.backward()


@case("a hook on the token embedding that changes the length")
def _(models: Models) -> None:
    embedding = models.compiled.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda m, a, found: found[:, 1:])
    try:
        models.call()
    finally:
        handle.remove()


@case("context parallelism around a call (`context_parallel` of torch.distributed)")
def _(models: Models) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    inputs = batch(models.compiled, ROWS)
    with one_process("cp") as mesh:
        ids = inputs["input_ids"]
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            models.compiled(**inputs)


@case("a side branch of layers (`twigvlm`) in a decoder that accelerate offloads")
def _(models: Models) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_llava(num_layers=3)
    twig = copy.deepcopy(model.get_decoder().layers[1:2])
    model = compiling(model, "inject=0,prune=1:3,score=twig", modules={"twig": twig})
    inputs = batch(model, ROWS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model(**inputs)


@case("a call under `FakeTensorMode`")
def _(models: Models) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        models.call()


@case("a learned ratio that is no number")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), PRUNED + ",selection=dtopk")
    model.hidrop_ratios.values.data.fill_(float("nan"))
    called(model)


# Generation and caches.


@case("chunked prefill")
def _(models: Models) -> None:
    models.generate(prefill_chunk_size=4)


@case("`use_cache=False` under a schedule")
def _(models: Models) -> None:
    models.generate(use_cache=False)


@case("`cache_implementation`")
def _(models: Models) -> None:
    models.generate(cache_implementation="static")


@case("a cache of another class, in `generate`")
def _(models: Models) -> None:
    models.generate(past_key_values=DynamicCache())


@case("a cache of another class, in `forward`")
def _(models: Models) -> None:
    models.call(past_key_values=DynamicCache())


@case("a cache of another schedule, or from before a change of the model")
def _(models: Models) -> None:
    model = compiling(tiny_llava(num_layers=2), "identity")
    with torch.no_grad():
        cache = called(model).past_key_values
    compiling(model, "exit=1")
    model(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)


@case("a compiled model's cache in another model")
def _(models: Models) -> None:
    tiny_llava()(input_ids=torch.tensor([[3], [4]]), past_key_values=models.cache())


@case(
    "a new image in a later turn, where positions are renumbered, tokens are merged or reduced, caches are cut, or "
    "gradients are enabled; of models with recurrent layers, windows that the conversation "
    "exceeds, or several devices"
)
def _(models: Models) -> None:
    model = compiling(tiny_llava(), "exit=1,positions=compact")
    with torch.no_grad():
        called(model, past_key_values=called(model).past_key_values)


@case("assisted decoding and prompt lookup behind an earlier turn")
def _(models: Models) -> None:
    ids = torch.tensor([[3], [4]])
    models.compiled(
        input_ids=ids, position_ids=torch.zeros_like(ids), past_key_values=models.cache()
    )


@case("another mask of the prompt than the cache was filled with")
def _(models: Models) -> None:
    mask = nn.functional.pad(models.inputs["attention_mask"], (0, 1), value=1)
    mask[0, -3] = 0
    ids = torch.tensor([[3], [4]])
    models.compiled(input_ids=ids, attention_mask=mask, past_key_values=models.cache())


@case("assisted decoding and prompt lookup where caches are cut")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), "cache=snapkv(window=2,capacity=5)")
    model.generate(**batch(model, ROWS[:1]), max_new_tokens=2, prompt_lookup_num_tokens=2)


@case("cropping a cache into its prompt")
def _(models: Models) -> None:
    models.cache().crop(-2)


@case(
    "another library's `forward` that keeps `labels` in its `**kwargs`, called as `model.forward(...)`"
)
def _(models: Models) -> None:
    model = compiling(tiny_llava(num_layers=2))
    model.forward = lambda **kwargs: model.model(**kwargs)
    model.forward(**models.inputs)


@case("learned ratios that are gone")
def _(models: Models) -> None:
    model = compiling(tiny_llava(num_layers=3), "inject=1,prune=1:6+2:3,selection=dtopk")
    del model.hidrop_ratios
    called(model)


@case("a pickled cache under another schedule, or in another compiled model")
def _(models: Models) -> None:
    cache = pickle.loads(pickle.dumps(models.cache()))
    model = compiling(tiny_llava())
    model(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)


# Tools.


@case("`save_compiled` of a backend that generates no code")
def _(models: Models) -> None:
    hidrop.save_compiled(models.compiled, "nowhere")


@case("`warmup` where images vary in size")
def _(models: Models) -> None:
    hidrop.warmup(compiling(tiny_tower("pixtral"), "identity"), [hidrop.Shape()], progress=False)


@case("`heatmap` of videos whose frames have no grid of their own (LLaVA-OneVision, Video-LLaVA)")
def _(models: Models) -> None:
    case = FAMILIES["video_llava"]
    model = case.make()
    given = make_batch(case, model, [[5, FAMILY_VIDEO, 6]]).inputs
    hidrop.heatmap(compiling(model, "prune=1:2"), given, None)


@case("`heatmap` behind `visionzip` or `ppe`")
def _(models: Models) -> None:
    model = compiling(tiny_llava(), "before=visionzip(dominant=2,contextual=1),prune=1:2")
    hidrop.heatmap(model, batch(model, ROWS), None)


@case("`heatmap` of crops")
def _(models: Models) -> None:
    crops = models.inputs["pixel_values"][None]
    hidrop.heatmap(models.compiled, models.inputs | {"pixel_values": crops}, None)


@case("`heatmap` of towers with tokens of their own")
def _(models: Models) -> None:
    model = compiling(tiny_tower("dinov2_with_registers"), PRUNED)
    hidrop.heatmap(model, sized_batch(model, [[5, (3, 3), 7]], tokens=13), None)


@case("a call without labels in a step of `DualTraining` that teaches")
def _(models: Models) -> object:
    model = hidrop.compile(tiny_llava(), {"fast": PRUNED, "full": "identity"}, backend="eager")
    with hidrop.DualTraining().step(model, 0):
        return model.train()(**models.inputs)


@case(
    "a loss that another library computes for itself, in such a step (TRL's trainers excepted that sum "
    "log-probabilities)"
)
def _(models: Models) -> object:
    named = {"fast": PRUNED, "full": "identity"}
    model: Any = hidrop.compile(tiny_llava(), named, backend="eager").train()
    model.forward = lambda input_ids, labels=None, **given: model.model(input_ids, **given)
    with hidrop.DualTraining(share=0.0).step(model, 0):
        ids, mask = models.inputs["input_ids"], models.inputs["attention_mask"]
        return model(**models.inputs, labels=ids.masked_fill(mask == 0, -100))


# The table.


def table() -> dict[str, str]:
    """Return the message of each row of the table of refusals."""
    text = PAGE.read_text(encoding="utf-8").partition("## What is different")[0]
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and not cells[0].startswith("**") and cells[0] != "what":
            assert len(cells) == 3, line
            message = cells[1]
            assert re.fullmatch("`.+`", message), f"no message: {line}"
            assert cells[0] not in found, f"two rows {cells[0]!r}"
            found[cells[0]] = message.strip("`")
    return found


TABLE = table()


@pytest.fixture(scope="module")
def models(compiled: Make) -> Models:
    return Models(compiled)


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert sorted(TABLE) == sorted(CASES)


@pytest.mark.parametrize("row", sorted(CASES))
def test_a_row_is_refused_with_its_message(row: str, models: Models) -> None:
    pattern = ".+?".join(map(re.escape, TABLE[row].split("...")))
    with pytest.raises(hidrop.HidropError) as refused:
        CASES[row](models)
    assert re.match(pattern, str(refused.value), re.DOTALL), str(refused.value)


def template(node: ast.AST) -> str:
    """Return a message as it is written, `...` for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (
            template(part) if isinstance(part, ast.Constant) else "..." for part in node.values
        )
        return re.sub(r"\.{3,}", "...", "".join(parts))
    return "..."


def refusals() -> dict[str, str]:
    """Return where each message of the refusing parts is raised."""
    found = {}
    for part in REFUSING:
        place = ROOT / "hidrop_fx" / part
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in errors.__all__:
                    at = f"{path.relative_to(ROOT)}:{node.lineno}"
                    found[template(node.args[0])] = at
    return found


def test_everything_that_is_refused_has_a_row() -> None:
    known = (*TABLE.values(), *MISTAKES)
    missing = {
        at: message
        for message, at in refusals().items()
        if message != "..." and not message.startswith(known)
    }
    assert missing == {}


def test_every_row_and_every_mistake_is_raised_somewhere() -> None:
    messages = tuple(refusals())
    unknown = [
        known
        for known in (*TABLE.values(), *MISTAKES)
        if not any(message.startswith(known) for message in messages)
    ]
    assert unknown == []
