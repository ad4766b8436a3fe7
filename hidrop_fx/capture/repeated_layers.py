"""Trace each kind of decoder layer once: the layers of that kind behind the first are copies of its nodes.

    repeated = RepeatedLayers(decoder)
    with repeated:
        program = torch.export.export(decoder, ...)      # layers.1 to layers.31 are one node each
    repeated.expand(program)                             # ... and a copy of the nodes of layers.0 now

Two layers are of one kind if all that their code could see is equal: classes, attributes, the shapes and dtypes of parameters,
the entry of `config.layer_types`, and what they are called with, tensors by dtype, shape and which of them are one. Their
number alone may differ, and the code of the traced one must not have looked at it. Layers with hooks or code of the user's
own, which may count its calls, and those of a decoder that has one module in two places, are traced one by one.
"""

import inspect
import operator
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from hidrop_fx.capture.layers import layer_list
from hidrop_fx.capture.libraries import is_foreign, is_foreign_home
from hidrop_fx.capture.recurrences import has_known_rule
from hidrop_fx.capture.regions import layers_in
from hidrop_fx.capture.watched_number import WatchedNumber
from hidrop_fx.ops.repeated_layer import LAYER_GIVEN, LAYER_LIKE, LAYER_RETURNED

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Attributes that hold a layer's number.
_NUMBER = re.compile(r"(^|_)(idx|index|id|number)$")
_SIZES = (int, float, torch.SymInt, torch.SymFloat)


class UnlikeError(Exception):
    """Layers cannot be compared, or were taken for one kind and are not."""


class _Traced(NamedTuple):
    """A layer that was traced, with what others of its kind need of it."""

    layer: int
    arguments: list[Any]
    places: list[int]
    """Of the inputs whose shape and dtype its outputs have."""
    nested: pytree.TreeSpec
    """How its outputs are nested."""
    tensors: list[bool]
    """Which of them are tensors; the others are None."""

    def returned(self, found: Sequence[Tensor]) -> Any:
        """Return outputs as the layer nests them."""
        values = iter(found)
        leaves = [next(values) if is_tensor else None for is_tensor in self.tensors]
        return pytree.tree_unflatten(leaves, self.nested)


class RepeatedLayers:
    """The layers of a decoder, each kind of which is traced once within this context."""

    def __init__(self, decoder: Any) -> None:
        self._path, self._layers = layer_list(decoder)
        types = getattr(decoder.config, "layer_types", None) or ()
        self._types = dict(enumerate(types))
        self._traced: dict[Hashable, list[_Traced]] = {}
        self._replaced: list[nn.Module] = []
        self._run: list[int] = []
        modules = [module for _, module in decoder.named_modules(remove_duplicate=False)]
        # Such a decoder is traced through stand-ins of its modules, by which their paths are known.
        self._shares_modules = len(set(modules)) < len(modules)

    def __enter__(self) -> "RepeatedLayers":
        if self._shares_modules:
            return self
        for index, layer in enumerate(self._layers):
            try:
                kind = (_kind(layer, index), self._types.get(index))
            except UnlikeError:
                continue
            vars(layer)["forward"] = partial(self._forward, layer, index, kind)
            self._replaced.append(layer)
        return self

    def __exit__(self, *exc: Any) -> None:
        for layer in self._replaced:
            del vars(layer)["forward"]
        self._replaced.clear()

    def _forward(
        self, layer: nn.Module, index: int, kind: Hashable, *args: Any, **kwargs: Any
    ) -> Any:
        leaves, nested = pytree.tree_flatten((args, kwargs))
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        called = _called_with(leaves)
        alike = self._traced.setdefault((kind, str(nested)), [])
        for known in alike:
            # Anew: sizes that were two when it was called may be known to be one by now.
            if _called_with(known.arguments) != called:
                continue
            found = torch.ops.hidrop.layer_like(tensors, known.places, index, known.layer)
            return known.returned(found)
        self._run.append(index)
        own: Callable[..., Any] = type(layer).forward
        own_tensors = torch.ops.hidrop.layer_given(tensors, index)
        given = {id(leaf): value for leaf, value in zip(tensors, own_tensors, strict=True)}
        args, kwargs = pytree.tree_unflatten([given.get(id(leaf), leaf) for leaf in leaves], nested)
        numbers = _watched_numbers(layer, index)
        try:
            returned = own(layer, *args, **kwargs)
        finally:
            for values, name, number in numbers:
                values[name] = number.value
        if any(number.seen for *_, number in numbers):
            return returned
        traced = _traced_as(index, leaves, tensors, returned)
        if traced is None:
            return returned
        alike.append(traced)
        outputs = [value for value in pytree.tree_leaves(returned) if isinstance(value, Tensor)]
        return traced.returned(torch.ops.hidrop.layer_returned(outputs, index))

    def expand(self, program: ExportedProgram) -> None:
        """Put copies of the traced layers' nodes in the place of the others.

        Raises:
            UnlikeError: a traced layer reads a value that it was not called with, or was called in several ways.
        """
        twice = next((index for index in self._run if self._run.count(index) > 1), None)
        if twice is not None:
            raise UnlikeError(f"{self._path}.{twice} is called in several ways")
        graph = program.graph
        given = _marks(graph, LAYER_GIVEN)
        if not given:
            return
        returned = _marks(graph, LAYER_RETURNED)
        members = dict(layers_in(graph, self._path))
        holders = _Holders(program)
        for node in [node for node in graph.nodes if node.target is LAYER_LIKE]:
            inputs, _, index, traced = node.args
            old, new = f"{self._path}.{traced}", f"{self._path}.{index}"
            copies: dict[fx.Node, fx.Node] = {
                user: inputs[user.args[1]] for user in given[traced].users
            }

            def copy_of(
                read: fx.Node,
                copies: dict[fx.Node, fx.Node] = copies,
                old: str = old,
                new: str = new,
            ) -> fx.Node:
                return copies[read] if read in copies else holders.in_layer(read, old, new)

            with graph.inserting_before(node):
                for member in members[traced]:
                    if _is_mark(member):
                        continue
                    copies[member] = graph.node_copy(member, copy_of)
                    _rename(copies[member], old, new)
            _put(node, [copies.get(output, output) for output in returned[traced].args[0]])
        for mark in (*given.values(), *returned.values()):
            _put(mark, mark.args[0])
        graph.lint()


class _Holders:
    """The inputs of an exported program that hold parameters, buffers and constants."""

    def __init__(self, program: ExportedProgram) -> None:
        specs = program.graph_signature.input_specs
        self._specs = {spec.arg.name: spec for spec in specs if spec.target is not None}
        self._named = {
            str(self._specs[node.name].target): node
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in self._specs
        }

    def in_layer(self, node: fx.Node, old: str, new: str) -> fx.Node:
        """Return what a copied layer reads in the place of a value from outside the traced one.

        Raises:
            UnlikeError: nothing says what that is.
        """
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.CONSTANT_TENSOR:
            inside = str(spec.target).startswith(f"{old}.")
            own = self._named.get(new + str(spec.target)[len(old) :]) if inside else None
            if own is None:
                raise UnlikeError(f"{old} reads {spec.target}")
            return own
        if spec is None and not isinstance(node.meta.get("val"), _SIZES):
            raise UnlikeError(f"{old} reads {node.name}, which it is not called with")
        return node


def _kind(layer: nn.Module, index: int) -> Hashable:
    """Return what a layer's code could see of it, its number aside."""
    if has_known_rule(layer):
        raise UnlikeError
    modules = tuple((path, _module(module, index)) for path, module in layer.named_modules())
    tensors = (
        *layer.named_parameters(remove_duplicate=False),
        *layer.named_buffers(remove_duplicate=False),
    )
    return modules, tuple((name, type(tensor), *_seen_of(tensor)) for name, tensor in tensors)


def _module(module: nn.Module, index: int) -> Hashable:
    own = vars(module)
    if "forward" in own or any(own.get(name) for name in _HOOKS) or _is_own_code(type(module)):
        raise UnlikeError
    skipped = {*_TABLES, *_HOOKS}
    values = [(name, own[name]) for name in sorted(own) if name not in skipped]
    held = tuple(frozenset(own[table]) for table in _TABLES)  # those that are None, too
    return (
        type(module),
        held,
        tuple(
            (name, "its number" if _is_number(name, value, index) else _value(value))
            for name, value in values
        ),
    )


def _is_own_code(kind: type[nn.Module]) -> bool:
    """Return True for a class that is no library's, or whose forward is not, or calls a function of its file that is not."""
    forward: Any = inspect.unwrap(kind.forward)
    home = getattr(forward, "__globals__", {})
    read = (home.get(name) for name in getattr(getattr(forward, "__code__", None), "co_names", ()))
    called = [value for value in read if isinstance(value, FunctionType)]
    homes = (base.__module__ for base in kind.__mro__[:-1])
    return any(map(is_foreign, (forward, *called))) or any(map(is_foreign_home, homes))


def _is_number(name: str, value: Any, index: int) -> bool:
    return type(value) is int and value == index and bool(_NUMBER.search(name))


def _value(value: Any) -> Hashable:
    """Return what two plain values are compared by; other objects are equal if they are one."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_value, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_value, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_value(name), _value(each)) for name, each in value.items())
    if type(value) is partial:  # activations
        return partial, *map(_value, (value.func, value.args, value.keywords))
    return type(value), id(value)


def _seen_of(tensor: Tensor) -> tuple[Hashable, ...]:
    # As text: to compare symbolic sizes is to decide on them.
    layout = f"{tuple(tensor.shape)} {tensor.stride()}"
    return layout, tensor.dtype, tensor.device, tensor.requires_grad


def _called_with(leaves: Sequence[Any]) -> Hashable:
    """Return what the arguments of two calls are compared by."""
    first: dict[int, int] = {}
    found: list[Hashable] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            found.append((type(leaf), first.setdefault(id(leaf), place), *_seen_of(leaf)))
        else:
            found.append(_value(leaf))
    return tuple(found)


def _watched_numbers(
    layer: nn.Module, index: int
) -> list[tuple[dict[str, Any], str, WatchedNumber]]:
    """Put watched numbers in the place of a layer's own."""
    found = []
    for module in layer.modules():
        values = vars(module)
        for name, value in list(values.items()):
            if _is_number(name, value, index):
                values[name] = WatchedNumber(index)
                found.append((values, name, values[name]))
    return found


def _traced_as(
    layer: int, arguments: list[Any], inputs: Sequence[Tensor], returned: Any
) -> _Traced | None:
    """Return what others need of a layer; None if what it returned cannot stand in for theirs.

    Args:
        inputs: the tensors among the arguments, each once, as the node of a layer like it reads them.
    """
    leaves, nested = pytree.tree_flatten(returned)
    tensors = [isinstance(leaf, Tensor) for leaf in leaves]
    places = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            alike = (k for k, each in enumerate(inputs) if _seen_of(each)[:3] == _seen_of(leaf)[:3])
            places.append(next(alike, -1))
        elif leaf is not None:
            return None
    if -1 in places or not places:
        return None
    return _Traced(layer, arguments, places, nested, tensors)


def _marks(graph: fx.Graph, target: Any) -> dict[int, Any]:
    """Return the marks of a kind by layer."""
    return {node.args[1]: node for node in graph.nodes if node.target is target}


def _is_mark(node: fx.Node) -> bool:
    """Return True for a mark, and for one of its outputs."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and source.target in (
        LAYER_GIVEN,
        LAYER_RETURNED,
        LAYER_LIKE,
    )


def _put(mark: fx.Node, values: Sequence[fx.Node]) -> None:
    """Put values in the place of the outputs of a mark, and erase it."""
    for user in list(mark.users):
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        mark.graph.erase_node(user)
    mark.graph.erase_node(mark)


def _rename(node: fx.Node, old: str, new: str) -> None:
    """Say of a copy that it is of another layer."""
    path = re.compile(rf"(^|\.){re.escape(old)}(?=\.|$)")
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        key: (path.sub(rf"\g<1>{new}", where), kind) for key, (where, kind) in stack.items()
    }
