"""Capture a Hugging Face text decoder as one FX graph with symbolic batch and length.

    hidden = decoder(inputs_embeds=..., position_ids=..., attention_mask=...).last_hidden_state

The modelling code is traced as it is by `torch.export`; only the name of its attention
implementation is changed while it runs, to one whose attention is a single opaque node
(`hidrop_fx.ops.attention`). Parameters in the captured graph are the model's own objects.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx.capture.adapters import traced_as_in_evaluation
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.complex_rotation import erase_idle_casts, make_real
from hidrop_fx.capture.convolutions import mark_convolutions
from hidrop_fx.capture.four_bit import call_four_bit, recorded_products
from hidrop_fx.capture.functional import is_write, write_as_functions
from hidrop_fx.capture.late_module import LateModule
from hidrop_fx.capture.layers import embedding_table, layer_list, tokenwise_layers, window_of
from hidrop_fx.capture.normalise import normalise
from hidrop_fx.capture.outer_products import write_elementwise
from hidrop_fx.capture.placement import shown_on
from hidrop_fx.capture.quantised import call_linear, plain_weights
from hidrop_fx.capture.recurrences import traced_recurrences
from hidrop_fx.capture.regions import describe
from hidrop_fx.capture.repeated_layers import RepeatedLayers
from hidrop_fx.capture.temperature import temperature_by_position, tempered
from hidrop_fx.capture.tokens_apart import refuse_mixed_tokens
from hidrop_fx.capture.traced_code import TracedCode
from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.functional import copied
from hidrop_fx.ops.mixers import CONVOLUTION, RECURRENT
from hidrop_fx.surroundings import neutral_surroundings

logger = logging.getLogger("hidrop_fx")

_IMPLEMENTATION = "hidrop"
# Two unequal sizes, so that neither is taken for the other or for a constant of the model.
_BATCH, _LENGTH = 3, 11
# Arguments of attention functions that say nothing about the result, or that hidrop_fx sets itself.
_NEUTRAL = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position"}
# Capture changes the registry of attention implementations and the model's config for a while.
_LOCK = threading.Lock()
_SLICE = re.compile(r"\.slice\(None, [^)]*\)")
# Traces of export that assert what was true while tracing; they compute nothing.
_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default}


@neutral_surroundings()
def capture(
    decoder: nn.Module,
    *,
    layer_types: tuple[str, ...] = (),
    axes: int = 1,
    device: torch.device | None = None,
) -> CapturedDecoder:
    """Trace `decoder` for any batch size and length.

    Args:
        decoder: the text model of a VLM, `model.get_decoder()`.
        layer_types: names of the attention patterns, and of convolutions, where the model takes a dict of
            masks; empty where one mask serves all layers.
        axes: axes of its position ids, [axes, B, S]; 1 for ids [B, S].
        device: where all of the decoder is to seem to be while it is traced; None where it is on one device.

    Raises:
        CaptureError: the model's code cannot be traced, or its attention does what no pass knows.
    """
    started = time.perf_counter()
    layers, listed = layer_list(decoder)
    num_layers = len(listed)
    code = TracedCode(decoder)
    with nullcontext() if device is None else shown_on(device, decoder):
        exported = _export(decoder, layer_types, axes, code)
    attending = [name for name in layer_types if name not in (CONVOLUTION, RECURRENT)]
    masks = tuple(f"mask_{name}" for name in attending) or ("mask",)
    module = _own_graph(exported, decoder, masks)
    normalise(module.graph, layers, num_layers)
    module.graph.eliminate_dead_code()
    refuse_mixed_tokens(module.graph)
    module.recompile()
    seconds = time.perf_counter() - started
    logger.info("captured %s, %d layers, in %.1f s", type(decoder).__name__, num_layers, seconds)
    return CapturedDecoder(
        module=module,
        layers=layers,
        num_layers=num_layers,
        masks=masks,
        static_sizes=_static_sizes(decoder, module.graph),
        seconds=seconds,
        tokenwise=tokenwise_layers(decoder.config),
        custom_backwards=dict(code.custom_backwards),
        ends_gradients=tuple(code.ends_gradients),
    )


def _static_sizes(decoder: nn.Module, graph: fx.Graph) -> frozenset[int]:
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [v for v in values if isinstance(v, Tensor)]
    shapes = [tensor.shape for tensor in (*tensors, *decoder.parameters(), *decoder.buffers())]
    return frozenset(size for shape in shapes for size in shape if type(size) is int)


def _export(
    decoder: Any, layer_types: tuple[str, ...], axes: int, code: TracedCode
) -> ExportedProgram:
    embedding = embedding_table(decoder)
    shape = (_BATCH, _LENGTH, decoder.config.hidden_size)
    hidden = torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
    mask = torch.ones(_BATCH, 1, _LENGTH, _LENGTH, dtype=torch.bool, device=hidden.device)
    places = torch.arange(_LENGTH, device=hidden.device).repeat(_BATCH, 1)
    tokens, square = (
        {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    )
    inputs: dict[str, Any] = {"inputs_embeds": hidden, "position_ids": places}
    shapes: dict[str, Any] = {"inputs_embeds": tokens, "position_ids": tokens}
    inputs["attention_mask"] = {t: mask.clone() for t in layer_types} if layer_types else mask
    shapes["attention_mask"] = dict.fromkeys(layer_types, square) if layer_types else square
    for kind in (CONVOLUTION, RECURRENT):  # pads come last, where it carries them to no other token
        if kind in layer_types:
            inputs["attention_mask"][kind] = shapes["attention_mask"][kind] = None
    if axes > 1:
        inputs["position_ids"] = places.repeat(axes, 1, 1)
        shapes["position_ids"] = {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    inputs["use_cache"], shapes["use_cache"] = False, None

    def trace(repeated: AbstractContextManager[Any]) -> ExportedProgram:
        with (
            attention_implemented_by(configs_of(decoder), _record_attention),
            _traceable_experts(decoder),
            plain_weights(decoder),
            traced_as_in_evaluation(decoder),
            repeated,
            recorded_products(decoder),
            traced_recurrences(decoder),
            temperature_by_position(decoder),
        ):
            with code:  # the decoder's own code alone, not that of a decomposition
                exported = torch.export.export(
                    decoder, (), inputs, dynamic_shapes=shapes, strict=False
                )
            if write_as_functions(exported.graph):
                return exported
            name = type(decoder).__name__
            logger.info("%s is traced twice: only torch can tell what it writes in place", name)
            return _functional(exported)

    try:
        try:
            repeated = RepeatedLayers(decoder)
            exported = trace(repeated)
            repeated.expand(exported)
        except CaptureError:
            raise
        except Exception as error:  # C code takes no watched number, for one
            name = type(decoder).__name__
            logger.info("%s is traced layer by layer: %s", name, _first_line(error))
            exported = trace(nullcontext())
        return exported
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export could not trace {type(decoder).__name__}, at {code.module_of(error)}: "
            f"{_first_line(error)}{_advice(error)}"
        ) from error


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Return a program that writes nothing in place, traced once more."""
    exported = exported.run_decompositions({})
    for node in exported.graph.nodes:
        # A view for the strides of the trace; what takes attention's place may return others.
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    return exported


@contextmanager
def _traceable_experts(decoder: Any) -> Iterator[None]:
    """Let experts run in the form that has no loop over those that were chosen, which no trace can follow."""
    loops = [
        c for c in configs_of(decoder) if getattr(c, "_experts_implementation", None) == "eager"
    ]
    try:
        for config in loops:
            config._experts_implementation = "grouped_mm"
        yield
    finally:
        for config in loops:
            config._experts_implementation = "eager"


def _advice(error: Exception) -> str:
    """Return what to do about an error of export, where its kind is known."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            ". This code decides by the value of a tensor (`if mask.any()`, `x.item()`), and a graph holds one "
            "branch for all values"
        )
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def configs_of(*modules: nn.Module) -> list[Any]:
    """Return the configurations that modules and those in them hold, each once."""
    named = (getattr(m, "config", None) for each in modules for m in each.modules())
    found = [config for config in named if hasattr(config, "_attn_implementation")]
    return list({id(config): config for config in found}.values())


@contextmanager
def attention_implemented_by(
    configs: Sequence[Any], attention: Callable[..., Any]
) -> Iterator[None]:
    """Let layers call `attention`, as transformers' interface names its arguments.

    Args:
        configs: those that the layers look it up in.

    One thread at a time: the registry of attention functions is transformers' own.
    """
    with _LOCK:
        configured = [config._attn_implementation for config in configs]
        ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = attention
        try:
            for config in configs:
                config._attn_implementation = _IMPLEMENTATION
            yield
        finally:
            for config, before in zip(configs, configured, strict=True):
                config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION]


def _record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    unknown = {k: v for k, v in kwargs.items() if k not in _NEUTRAL and v is not None}
    if unknown:
        raise CaptureError(
            f"{type(module).__name__} calls attention with {sorted(unknown)}, which hidrop_fx does "
            "not carry over; leaving it out would change the softmax silently"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = window_of(module, sliding_window)
    output = torch.ops.hidrop.attention(
        tempered(module, query), key, value, attention_mask, scale, dropout, window, softcap, s_aux
    )
    return output.transpose(1, 2).contiguous(), None


def _own_graph(
    exported: ExportedProgram, decoder: nn.Module, masks: tuple[str, ...]
) -> fx.GraphModule:
    """Return the exported graph with parameters as `get_attr` of the decoder's own tensors."""
    _refuse_writes(exported)
    tensors: dict[str, Tensor] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = iter(("inputs_embeds", "position_ids", *masks))
    for node in exported.graph.nodes:
        if node.target in _ASSERTIONS:
            continue
        if node.op == "output":
            graph.output(copies[node.args[0][0]])
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            _name_slices(copies[node])
        elif specs[node.name].kind is not InputKind.USER_INPUT:
            if node.users:
                copies[node] = _as_attribute(
                    graph, node, specs[node.name], exported, decoder, tensors
                )
        elif isinstance(node.meta.get("val"), Tensor):
            copies[node] = graph.placeholder(next(names))
            copies[node].meta.update(node.meta)
    graph.eliminate_dead_code()
    erase_idle_casts(graph)
    make_real(graph)
    _make_functional(graph)
    call_linear(graph, tensors)
    call_four_bit(graph)
    write_elementwise(graph)
    mark_convolutions(graph)
    graph.lint()
    return LateModule(tensors, graph, "CapturedDecoder")


def _make_functional(graph: fx.Graph) -> None:
    """Give copies a derivative; refuse what writes in place, which a pass that copies nodes would lose.

    Raises:
        CaptureError: names the operator and where it stands.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.copy.default:
            node.target = copied
        elif is_write(node):
            raise CaptureError(
                f"the captured graph writes in place: {describe(node)}; a rewritten decoder computes such "
                "values anew for other tokens, and would lose what was written"
            )


def _refuse_writes(exported: ExportedProgram) -> None:
    """Raise where the decoder's code writes to a tensor of its own, which the captured graph would not."""
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the forward of the decoder writes to {spec.target}, as running averages and "
                "torch.nn.utils.parametrizations.spectral_norm in training do, and a captured graph writes "
                "to no tensor of the model. Call model.eval(), or take that module out"
            )


def _name_slices(node: fx.Node) -> None:
    """Write paths of modules as the decoder has them.

    For `self.layers[:n]`, export names a module "layers.slice(None, n, None).0" in some models.
    """
    stack = node.meta.get("nn_module_stack")
    if stack and any("slice(None" in path for path, _ in stack.values()):
        node.meta["nn_module_stack"] = {
            key: (_SLICE.sub("", path), kind) for key, (path, kind) in stack.items()
        }


def _as_attribute(
    graph: fx.Graph,
    node: fx.Node,
    spec: Any,
    exported: ExportedProgram,
    decoder: nn.Module,
    tensors: dict[str, Tensor],
) -> fx.Node:
    find: dict[InputKind, Callable[[str], Tensor]] = {
        InputKind.PARAMETER: decoder.get_parameter,
        InputKind.BUFFER: decoder.get_buffer,
        InputKind.CONSTANT_TENSOR: exported.constants.__getitem__,
    }
    if spec.kind not in find:
        raise CaptureError(f"the captured graph reads {node.name}, a {spec.kind.name.lower()}")
    tensors[spec.target] = find[spec.kind](spec.target)
    attribute = graph.create_node("get_attr", spec.target, name=node.name)
    attribute.meta["val"] = node.meta["val"]
    return attribute
