"""Capture of every backbone, and the regions of its decoder layers; each error on a graph built by hand.

Over 400 lines: the graphs built by hand stand beside the errors that they cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx import CaptureError, Plan, Schedule
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.export import capture
from hidrop_fx.capture.normalise import normalise
from hidrop_fx.capture.regions import Region, describe, find_regions, module_path, tensor_inputs
from hidrop_fx.ops.attention import CAPTURED_ATTENTION, causal_attention
from hidrop_fx.passes import attention
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.program.program import Program
from tests.support.captured import capture_of
from tests.support.models import BACKBONES, tiny_llava

aten = torch.ops.aten
LAYERS = 2
VARIANTS = [*((name, None) for name in BACKBONES), ("mistral", 6), ("qwen2", 6)]

Captured = tuple[Any, CapturedDecoder]


@pytest.fixture(scope="module")
def captured_once() -> Callable[[str, int | None], Captured]:
    made: dict[Any, Captured] = {}

    def get(backbone: str, window: int | None) -> Captured:
        if (backbone, window) not in made:
            model = tiny_llava(backbone, num_layers=LAYERS, kv_heads=2, sliding_window=window)
            made[backbone, window] = model, capture_of(model)
        return made[backbone, window]

    return get


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}-window" if v[1] else v[0])
def captured(
    request: pytest.FixtureRequest, captured_once: Callable[[str, int | None], Captured]
) -> Captured:
    return captured_once(*request.param)


@pytest.fixture
def llama(captured_once: Callable[[str, int | None], Captured]) -> Captured:
    return captured_once("llama", None)


# Capture of real models.


def test_one_region_per_layer_with_one_live_out(captured: Captured) -> None:
    _, decoder = captured
    graph = decoder.module.graph
    before = str(graph)
    regions = find_regions(graph, decoder.layers, decoder.num_layers)
    assert str(graph) == before
    assert [(r.layer, r.path) for r in regions] == [(0, "layers.0"), (1, "layers.1")]
    assert regions[0].hidden.name == "inputs_embeds"
    assert regions[1].hidden is regions[0].live_out
    for region in regions:
        inside = set(region.nodes)
        assert [n for n in region.nodes if any(u not in inside for u in n.users)] == [
            region.live_out
        ]
        assert region.attention in inside
        assert region.attention.target is CAPTURED_ATTENTION
        # cos, sin and the layer's mask, and nothing else but the hidden states.
        assert set(tensor_inputs(region.nodes)) == {region.hidden, *region.live_ins}
        assert len(region.live_ins) == 3
        assert all(live_in is node for live_in, node in region.live_ins.items())
    assert not set(regions[0].nodes) & set(regions[1].nodes)


def test_regions_read_sizes_from_their_own_hidden_states(llama: Captured) -> None:
    _, decoder = llama
    graph = decoder.module.graph
    for region in find_regions(graph, decoder.layers, decoder.num_layers):
        sizes = [n for n in region.nodes if n.target is aten.sym_size.int]
        assert [n.args for n in sizes] == [(region.hidden, 1), (region.hidden, 0)]


def test_every_layer_is_captured_with_its_own_mask_and_window(
    captured_once: Callable[[str, int | None], Captured],
) -> None:
    def masks(backbone: str, window: int | None) -> list[tuple[str, int | None]]:
        graph = captured_once(backbone, window)[1].module.graph
        found = [n.args for n in graph.nodes if n.target is CAPTURED_ATTENTION]
        return [(args[3].name, args[6]) for args in found]

    assert masks("llama", None) == [("mask", None), ("mask", None)]
    assert masks("mistral", 6) == [("mask", 6), ("mask", 6)]
    assert masks("qwen3", None) == [("mask_full_attention", None)] * 2
    assert masks("qwen2", 6) == [("mask_full_attention", None), ("mask_sliding_attention", 6)]


def test_placeholders_are_the_embeddings_the_ids_and_the_masks(captured: Captured) -> None:
    _, decoder = captured
    assert list(decoder.placeholders) == ["inputs_embeds", "position_ids", *decoder.masks]
    batch, length, width = decoder.placeholders["inputs_embeds"].meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(length, torch.SymInt)
    assert width == 32
    assert decoder.seconds > 0


def test_parameters_are_the_models_own_objects(captured: Captured) -> None:
    model, decoder = captured
    own = dict(model.get_decoder().named_parameters()) | dict(model.get_decoder().named_buffers())
    read = [str(n.target) for n in decoder.module.graph.nodes if n.op == "get_attr"]
    assert len(read) == len(set(read))
    for name in read:
        owner, _, leaf = name.rpartition(".")
        assert getattr(decoder.module.get_submodule(owner), leaf) is own[name]
    assert {n for n in own if n.startswith("layers.")} <= set(read)


def test_the_attention_implementation_is_restored(captured: Captured) -> None:
    model, _ = captured
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert "hidrop" not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("shape", [(1, 2), (2, 7), (5, 13)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_captured_graph_with_attention_equals_hf_at_any_size(
    captured_once: Callable[[str, int | None], Captured], backbone: str, shape: tuple[int, int]
) -> None:
    model, decoder = captured_once(backbone, None)
    program = Program(decoder, Plan.of(Schedule(), depth_of(model)), "train")
    assert program.apply(attention).matched == LAYERS
    program.module.recompile()
    batch, length = shape
    embeds = torch.randn(batch, length, 32)
    ids = torch.arange(length).repeat(batch, 1)
    with torch.no_grad():
        ours = program.module(embeds, ids, *[None] * len(decoder.masks))
        theirs = model.get_decoder()(inputs_embeds=embeds, position_ids=ids).last_hidden_state
    assert torch.equal(ours, theirs)


# Errors of capture.


class Failure:
    """A tiny decoder that capture must refuse, and its attention implementation before."""

    def __init__(self) -> None:
        self.decoder: Any = tiny_llava(num_layers=LAYERS, attn="eager").get_decoder()

    def capture(self) -> None:
        capture(self.decoder)

    def check(self) -> None:
        assert self.decoder.config._attn_implementation == "eager"
        assert "hidrop" not in ALL_ATTENTION_FUNCTIONS


def test_control_flow_on_data_is_refused_and_nothing_stays_changed() -> None:
    failure = Failure()
    mlp = failure.decoder.layers[1].mlp
    mlp.forward = lambda x: x if x.sum() > 0 else -x
    with pytest.raises(
        CaptureError,
        match=r"torch\.export could not trace LlamaModel, at layers\.1\.mlp .*: .*by the value of a tensor",
    ):
        failure.capture()
    failure.check()


def test_an_argument_of_attention_that_no_pass_knows_is_refused() -> None:
    failure = Failure()
    module = failure.decoder.layers[1].self_attn
    original = module.forward
    module.forward = lambda *args, **kwargs: original(
        *args, position_bias=30.0, layer_head=None, **kwargs
    )
    with pytest.raises(
        CaptureError,
        match=r"LlamaAttention calls attention with \['position_bias'\], which hidrop_fx does not carry over; "
        r"leaving it out would change the softmax silently",
    ):
        failure.capture()
    failure.check()


def test_a_decoder_of_fewer_layers_than_its_config_says_is_refused() -> None:
    failure = Failure()
    failure.decoder.config.num_hidden_layers = 3
    message = (
        r"has 2 layers, and its config.num_hidden_layers is 3: .* config.num_hidden_layers = 2"
    )
    with pytest.raises(CaptureError, match=message):
        failure.capture()
    failure.check()


def test_attention_that_bypasses_the_interface_is_refused() -> None:
    failure = Failure()
    module = failure.decoder.layers[1].self_attn

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return module.o_proj(module.v_proj(hidden_states)), None

    module.forward = forward
    captured = capture(failure.decoder)
    with pytest.raises(
        CaptureError, match=r"layers\.1 holds 0 attentions, not one; .*AttentionInterface"
    ):
        find_regions(captured.module.graph, captured.layers, captured.num_layers)


# Regions of graphs built by hand.


class Build:
    """A captured-like graph: symbolic batch and length, width 4, values under one fake mode."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(shape_env=ShapeEnv())
        batch, length = self.size("batch", 5), self.size("length", 7)
        self.embeds = self.input("inputs_embeds", batch, length, 4)
        self.cos = self.input("cos", batch, length, 4)

    def size(self, name: str, hint: int) -> Any:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        value = self.fake.from_tensor(
            torch.empty(hint), symbolic_context=context, source=ConstantSource(name)
        )
        return value.shape[0]

    def input(self, name: str, *shape: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty(shape)
        return node

    def call(self, target: Any, *args: Any, path: str = "") -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.fake:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        if path:
            node.meta["nn_module_stack"] = {
                "L": ("", nn.Module), "M": (path.rsplit(".", 1)[0], nn.Module), "N": (path, nn.Module),
            }  # fmt: skip
        return node

    def attention(self, query: fx.Node, path: str) -> fx.Node:
        return self.call(CAPTURED_ATTENTION, query, query, query, None, 0.5, 0.0, None, path=path)

    def layer(self, k: int, hidden: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Its rotated query and its output."""
        query = self.call(aten.mul.Tensor, hidden, self.cos, path=f"layers.{k}.self_attn")
        mixed = self.attention(query, f"layers.{k}.self_attn")
        return query, self.call(aten.add.Tensor, hidden, mixed, path=f"layers.{k}")

    def regions(self, output: fx.Node, num_layers: int = LAYERS) -> list[Region]:
        self.graph.output(output)
        normalise(self.graph, "layers", num_layers)
        self.graph.lint()
        return find_regions(self.graph, "layers", num_layers)


def test_regions_of_a_graph_built_by_hand() -> None:
    build = Build()
    query, first = build.layer(0, build.embeds)
    _, second = build.layer(1, first)
    norm = build.call(aten.neg.default, second, path="norm")
    one, two = build.regions(norm)
    assert one.nodes == [query, query.next, first]
    assert (one.hidden, one.live_out, one.attention) == (build.embeds, first, query.next)
    assert one.live_ins == two.live_ins == {build.cos: build.cos}
    assert (two.hidden, two.live_out) == (first, second)
    assert norm not in two.nodes


def test_region_read_changes_the_nodes_of_one_region_only() -> None:
    build = Build()
    query, first = build.layer(0, build.embeds)
    second_query, second = build.layer(1, first)
    one, _ = build.regions(second)
    sin = build.graph.placeholder("sin")
    one.read(build.cos, sin)
    assert query.args == (build.embeds, sin)
    assert second_query.args == (first, build.cos)


@pytest.mark.parametrize("path", ["extra_layers.0", "layers.0x", "other", "norm.layers"])
def test_paths_that_only_resemble_a_layer_are_outside(path: str) -> None:
    build = Build()
    _, first = build.layer(0, build.embeds)
    outside = build.call(aten.neg.default, first, path=path)
    (region,) = build.regions(outside, num_layers=1)
    assert outside not in region.nodes


def test_path_of_layer_ten_is_not_within_layer_one() -> None:
    build = Build()
    hidden = build.embeds
    for k in range(11):
        _, hidden = build.layer(k, hidden)
    assert [len(r.nodes) for r in build.regions(hidden, num_layers=11)] == [3] * 11


def test_a_size_from_outside_becomes_the_size_of_the_layers_own_hidden_states() -> None:
    build = Build()
    length = build.call(aten.sym_size.int, build.embeds, 1)
    batch = build.call(aten.sym_size.int, build.embeds, 0)
    _, first = build.layer(0, build.embeds)
    view = build.call(aten.view.default, first, [batch, length, 4], path="layers.1")
    mixed = build.attention(view, "layers.1.self_attn")
    one, two = build.regions(build.call(aten.add.Tensor, first, mixed, path="layers.1"))
    assert len(one.nodes) == 3
    assert [n.target for n in two.nodes[:2]] == [aten.sym_size.int] * 2
    assert {n.args for n in two.nodes[:2]} == {(first, 0), (first, 1)}
    assert set(tensor_inputs(two.nodes)) == {first}
    sizes = {n.args[1]: n for n in two.nodes[:2]}
    assert view.args == (first, [sizes[0], sizes[1], 4])
    assert not length.users
    assert not batch.users


def test_a_graph_whose_sizes_come_from_outside_has_to_be_normalised() -> None:
    build = Build()
    length = build.call(aten.sym_size.int, build.embeds, 1)
    view = build.call(aten.view.default, build.embeds, [-1, length, 4], path="layers.0")
    mixed = build.attention(view, "layers.0.self_attn")
    build.graph.output(build.call(aten.add.Tensor, build.embeds, mixed, path="layers.0"))
    before = str(build.graph)
    with pytest.raises(
        CaptureError, match=r"^layers\.0 reads the size sym_size_int .* from outside; .*normalise"
    ):
        find_regions(build.graph, "layers", 1)
    assert str(build.graph) == before


def test_static_sizes_are_those_of_parameters_and_values(llama: Captured) -> None:
    model, decoder = llama
    vocabulary, width = model.get_input_embeddings().weight.shape
    heads = 8  # of one key-value head's width
    assert {vocabulary, width, heads} <= decoder.static_sizes
    assert not {s for s in decoder.static_sizes if type(s) is not int}


def test_two_live_outs_are_refused() -> None:
    build = Build()
    query, first = build.layer(0, build.embeds)
    _, second = build.layer(1, first)
    output = build.call(aten.add.Tensor, query, second)
    with pytest.raises(
        CaptureError,
        match=r"^layers\.0 must hand on one value, its hidden states, but hands on 2: "
        r"mul_tensor \(s\d+, s\d+, 4\) \[aten\.mul\.Tensor\] in layers\.0\.self_attn, "
        r"add_tensor \(s\d+, s\d+, 4\) \[aten\.add\.Tensor\] in layers\.0; .*cannot be split",
    ):
        build.regions(output)


def test_a_size_as_second_live_out_is_refused() -> None:
    build = Build()
    _, first = build.layer(0, build.embeds)
    size = build.call(aten.sym_size.int, first, 1, path="layers.0")
    view = build.call(aten.view.default, first, [-1, size, 4])
    with pytest.raises(
        CaptureError,
        match=r"^layers\.0 must .* hands on 2: add_tensor .*, sym_size_int \[aten\.sym_size\.int\]",
    ):
        build.regions(view, num_layers=1)


def test_a_layer_without_live_out_is_refused() -> None:
    build = Build()
    build.layer(0, build.embeds)
    with pytest.raises(CaptureError, match=r"^layers\.0 must .* but hands on 0: none"):
        build.regions(build.embeds, num_layers=1)


def test_a_missing_layer_is_refused() -> None:
    build = Build()
    _, first = build.layer(0, build.embeds)
    _, third = build.layer(2, first)
    with pytest.raises(
        CaptureError,
        match=r"^the captured graph holds no node of layers\.1 \(2 of 3 layers found\); .*hooks",
    ):
        build.regions(third, num_layers=3)


def test_a_size_that_is_neither_batch_nor_length_is_refused() -> None:
    build = Build()
    other = build.input("other", build.size("other", 28), 3)
    size = build.call(aten.sym_size.int, other, 0)
    _, first = build.layer(0, build.embeds)
    query = build.call(aten.mul.Tensor, first, size, path="layers.1")
    mixed = build.attention(query, "layers.1.self_attn")
    with pytest.raises(
        CaptureError,
        match=r"^layers\.1 reads sym_size_int \[aten\.sym_size\.int\] = s\d+, which is neither the batch "
        r"size s\d+ nor the length s\d+; write it with sizes of the layer's own input",
    ):
        build.regions(build.call(aten.add.Tensor, first, mixed, path="layers.1"))


@pytest.mark.parametrize("count", [0, 2])
def test_a_layer_with_no_attention_or_two_is_refused(count: int) -> None:
    build = Build()
    mixed = build.call(aten.neg.default, build.embeds, path="layers.0")
    for _ in range(count):
        mixed = build.attention(mixed, "layers.0.self_attn")
    with pytest.raises(
        CaptureError, match=rf"^layers\.0 holds {count} attentions, not one; .*_attn_implementation"
    ):
        build.regions(mixed, num_layers=1)


def test_a_layer_that_does_not_read_the_previous_hidden_states_is_refused() -> None:
    build = Build()
    _, first = build.layer(0, build.embeds)
    _, second = build.layer(1, build.embeds)
    output = build.call(aten.add.Tensor, first, second)
    with pytest.raises(
        CaptureError,
        match=r"^layers\.1 does not read the hidden states of the layer before it, "
        r"add_tensor \(s\d+, s\d+, 4\) \[aten\.add\.Tensor\] in layers\.0; "
        r"it reads inputs_embeds \(s\d+, s\d+, 4\) \[inputs_embeds\], cos \(",
    ):
        build.regions(output)


def test_a_first_layer_that_does_not_read_the_embeddings_is_refused() -> None:
    build = Build()
    _, first = build.layer(0, build.cos)
    with pytest.raises(CaptureError, match=r"^layers\.0 does not read .*, inputs_embeds \("):
        build.regions(first, num_layers=1)


def test_describe_tells_name_shape_operator_module_and_source_line() -> None:
    build = Build()
    node = build.call(aten.neg.default, build.embeds, path="layers.3.mlp")
    node.meta["stack_trace"] = (
        'File "a.py", line 1, in f\n  g(x)\nFile "llama.py", line 7, in g\n  -x\n'
    )
    batch, length = build.embeds.meta["val"].shape[:2]
    assert describe(node) == (
        f"neg_default ({batch}, {length}, 4) [aten.neg.default] in layers.3.mlp "
        '(File "llama.py", line 7, in g)'
    )
    assert module_path(node) == "layers.3.mlp"
    assert module_path(build.embeds) == ""


def test_tensor_inputs_leaves_parameters_out_and_keeps_the_order_of_use() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    weight = graph.get_attr("weight")
    first = graph.call_function(torch.mul, (b, weight))
    second = graph.call_function(torch.add, (first, a))
    assert tensor_inputs([second, first]) == [b, a]
    assert tensor_inputs([second]) == [first, a]


def test_the_captured_attention_says_that_it_has_no_kernel() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(
        RuntimeError, match=r"has no kernel; run the `attention` or `kv_cache` pass"
    ):
        torch.ops.hidrop.attention(states, states, states, None, 1.0, 0.0, None)
    assert causal_attention(states, states, states, 1.0).shape == states.shape
