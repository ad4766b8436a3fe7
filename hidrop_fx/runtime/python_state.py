"""The Python state that a trace of some code depends on, found from its roots.

state = PythonState({"layers.0": layer, "layers.1": other})
state.parts                              # equal for equal states
state.watched.unchanged()                # whether nothing was bound to anything else since

Followed are attributes, containers, closures, defaults, and the globals that a decoder's functions read,
into whatever is not part of a library; `hidrop_fx.runtime.fingerprint` says what that comes to.
"""

import argparse
import functools
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hidrop_fx.capture.hooks import BACKWARD, FORWARD, function_of, is_bookkeeping
from hidrop_fx.capture.libraries import is_foreign, is_foreign_home
from hidrop_fx.capture.zero3 import ATTRIBUTES
from hidrop_fx.runtime.watched import PLAIN, Watched

Label = tuple[Any, ...]
"""Where a value was found, from the outside in: ("layers.0.mlp", "forward", "scale")."""

# Their functions are a decoder's own code, and are read as its globals are.
_DECODER_CODE = (
    *("transformers.models.", "transformers.activations", "torch.nn.modules."),
    "peft.tuners.",
)
_DESCRIPTION = frozenset(
    (
        *("__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__qualname__"),
        *("__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__slots__"),
        *("__match_args__", "__dataclass_fields__", "__dataclass_params__"),
    )
)
_EVERY_MODULE = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
_VALUES = (*PLAIN, torch.dtype, torch.device, torch.Size, range)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_LARGE = 1000
"""Elements up to which a container is compared by what it holds."""
_DEEP = 12
"""Steps from a module up to which objects are followed."""

# Read at every call instead, or not at all by the layers' code.
_NOT_IN_GRAPH = frozenset(
    (
        *("gradient_checkpointing", "_gradient_checkpointing_func", "warnings_issued"),
        *("_require_grads_hook", "_require_grads_hooks", "_is_hf_initialized"),
    )
)
_NOT_READ_OF_CONFIG = frozenset(
    (
        *("use_cache", "return_dict", "output_hidden_states", "_output_attentions", "dtype"),
        *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
        *("id2label", "label2id", "problem_type", "architectures", "transformers_version"),
        *("_name_or_path", "name_or_path", "_commit_hash", "initializer_range"),
        "_attn_implementation_internal",  # looked up when a snapshot is taken
    )
)

HOOKS = FORWARD + BACKWARD
TABLES = (*HOOKS, "_parameters", "_buffers", "_modules")
"""What a module keeps apart, and changes in place."""
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"} | _NOT_IN_GRAPH | ATTRIBUTES


class Same:
    """An object that is equal to itself alone, kept alive so that no other takes its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class PythonState:
    """Values that code reads, in the order in which they are found.

    Attributes:
        labels, parts: where each value was found, and what stands for it.
        watched: the same, for a quick look whether anything changed.
        tensors: whose dtype and device count.

    Args:
        modules: whose state it is, by path.
        ignored: labels that are left out, with all that is found through them.
        left_out: tables of the modules whose tensors do not count: "_parameters", "_buffers".
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        ignored: Collection[Label] = (),
        *,
        left_out: Collection[str] = (),
    ) -> None:
        self.labels: list[Label] = []
        self.parts: list[Any] = []
        self.watched = Watched()
        self.tensors: list[Tensor] = []
        self._ignored = ignored
        self._tensor_tables = [t for t in ("_parameters", "_buffers") if t not in left_out]
        self._seen: dict[int, Label] = {}
        self._alive: list[Any] = []
        self._open: set[int] = set()
        self._classes: set[type] = set()
        self._globals_read: set[tuple[int, str]] = set()
        self._names: set[str] = set()
        self._objects: list[tuple[Label, Any]] = []
        for path, module in modules.items():
            self._first_visit((path,), module)
        for path, module in modules.items():
            self._module(path, module)
        self._follow_objects()

    def _module(self, place: str, module: nn.Module) -> None:
        """Add a module: its class, attributes, tensors and hooks, and which its children are."""
        live = module.__dict__
        self._add((place, "__class__"), Same(type(module)))
        self._namespace((place,), live, [name for name in live if name not in _BOOKKEEPING])
        for table in self._tensor_tables:
            for name, tensor in live[table].items():
                if tensor is not None:
                    self._tensor((place, name), tensor)
        for name, child in live["_modules"].items():
            self._add((place, name), Same(child))
        for table in HOOKS:
            for hook in live[table].values():
                if not is_bookkeeping(hook):
                    self.value((place, table), hook)
        self._class(type(module))

    def value(self, label: Label, value: Any) -> None:
        """Add a value, and what is found through it."""
        if label in self._ignored:
            return
        if type(value) in _VALUES:
            self._add(label, (type(value), value))
        elif isinstance(value, Tensor):
            self._tensor(label, value)
        elif isinstance(value, (dict, list, tuple, set, frozenset, deque)):
            if id(value) in self._open:
                self._add(label, "within itself")
                return
            self._open.add(id(value))
            self._container(label, value)
            self._open.discard(id(value))
        elif not self._first_visit(label, value):
            self._add(label, self._seen[id(value)])
        elif len(label) > _DEEP:
            self._add(label, Same(value))
        else:
            self._follow(label, value)

    def _class(self, kind: type) -> None:
        """Add what a class, and those that it inherits from, bind."""
        for base in kind.__mro__:
            if base is object or base in self._classes:
                continue
            self._classes.add(base)
            label, live = (f"{base.__module__}.{base.__qualname__}",), vars(base)
            if base is nn.Module:
                self.watched.mapping(live, _EVERY_MODULE, whole=False)
                self._add(label, tuple(Same(live[name]) for name in _EVERY_MODULE))
                continue
            names = [name for name in live if name not in _DESCRIPTION]
            if _is_decoder_code(base.__module__):
                self._namespace(label, live, names)
            else:
                self.watched.mapping(live, names)
                self._add(label, tuple(Same(live[name]) for name in names))

    def _follow(self, label: Label, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(label, value)
        elif isinstance(value, types.MethodType):
            self.value((*label, "__func__"), value.__func__)
            self.value((*label, "__self__"), value.__self__)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self.value((*label, name), getattr(value, name))
        elif isinstance(value, (staticmethod, classmethod)):
            self.value(label, value.__func__)
        elif isinstance(value, property):
            self.value(label, value.fget)
        elif isinstance(value, PreTrainedConfig):
            self._config(label, value)
        elif isinstance(value, nn.Module):
            self._outer_module(label, value)
        else:
            self._object(label, value)

    def _add(self, label: Label, part: Any) -> None:
        self.labels.append(label)
        self.parts.append(part)

    def _first_visit(self, label: Label, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = label
        self._alive.append(value)
        return True

    def _namespace(
        self, label: Label, live: Mapping[str, Any], names: Iterable[str], *, whole: bool = True
    ) -> None:
        if self._ignored:
            names = [name for name in names if (*label, name) not in self._ignored]
        names = list(names)
        self.watched.mapping(live, names, whole=whole)
        for name in names:
            value = live[name]
            if type(value) in PLAIN:
                self._add((*label, name), (type(value), value))
            else:
                self.value((*label, name), value)

    def _tensor(self, label: Label, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self._add(label, (Same(tensor), type(tensor), tensor.dtype, tensor.device))

    def _container(self, label: Label, values: Collection[Any]) -> None:
        self._alive.append(values)
        self._add(label, (type(values), len(values)))
        if len(values) > _LARGE:
            self._add(label, Same(values))
        elif isinstance(values, dict):
            self.watched.mapping(values, [k for k in values if (*label, k) not in self._ignored])
            for key, value in values.items():
                if type(key) not in PLAIN:
                    self._add(label, Same(key))
                self.value((*label, key if type(key) in PLAIN else type(key).__name__), value)
        elif isinstance(values, (set, frozenset)):
            self._add(label, frozenset(v if type(v) in PLAIN else Same(v) for v in values))
            self.watched.elements(values)
        else:
            if not isinstance(values, tuple):
                self.watched.elements(values)
            for place, value in enumerate(values):
                self.value((*label, place), value)

    def _function(self, label: Label, function: types.FunctionType) -> None:
        self.watched.attributes(function, ("__code__", "__defaults__", "__kwdefaults__"))
        code = function.__code__
        self._add(label, code)
        for values in (function.__defaults__, function.__kwdefaults__):
            if values:
                self.value((*label, "default"), values)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            inside = (*label, name)
            if inside in self._ignored:
                continue
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self.watched.attributes(cell, ("cell_contents",))
            self.value(inside, value)
        home = function.__globals__
        if not _is_decoder_code(home.get("__name__", "")):
            return
        if function.__dict__:
            self._namespace(label, function.__dict__, list(function.__dict__))
        names = set(_names(code))
        self._names |= names
        self._globals(home, names)

    def _globals(self, home: Mapping[str, Any], names: Collection[str]) -> None:
        """Add the names that code reads in a Python module, and in modules that it reads there."""
        place = str(home.get("__name__", ""))
        ours = is_foreign_home(place)
        new = [name for name in self._new((place,), home, names) if not name.startswith("__")]
        self.watched.mapping(home, new, whole=False)
        for name in new:
            value, label = home[name], (place, name)
            if isinstance(value, types.ModuleType):
                self._add(label, Same(value))
                self._globals(vars(value), names)
            elif ours or _defined_in(value, home) or type(value) in PLAIN:
                self.value(label, value)
            else:
                self._add(label, Same(value))

    def _read(self, label: Label, live: Mapping[str, Any], names: Collection[str]) -> None:
        new = self._new(label, live, names)
        if new:
            self._namespace(label, live, new)

    def _new(self, label: Label, live: Mapping[str, Any], names: Collection[str]) -> list[str]:
        """Return which of the names are bound there and were not added yet."""
        new = [
            name
            for name in sorted(names)
            if name in live
            and (id(live), name) not in self._globals_read
            and (*label, name) not in self._ignored
        ]
        self._globals_read.update((id(live), name) for name in new)
        return new

    def _config(self, label: Label, config: Any) -> None:
        live = vars(config)
        self._add(label, type(config))
        self._namespace(label, live, [name for name in live if name not in _NOT_READ_OF_CONFIG])

    def _outer_module(self, label: Label, module: nn.Module) -> None:
        """Add a module that is none of the roots, with those inside it."""
        self._add(label, Same(module))
        inside = dict(module.named_modules(prefix=shown(label)))
        if any(id(part) in self._seen for part in inside.values() if part is not module):
            return  # it is around those of the state, such as the whole model
        for path, part in inside.items():
            self._first_visit((path,), part)
        for path, part in inside.items():
            self._module(path, part)

    def _object(self, label: Label, value: Any) -> None:
        self._add(label, Same(value))
        kind = type(value)
        followed = is_foreign_home(kind.__module__) or kind.__module__ == "accelerate.hooks"
        if (followed or kind in _NAMESPACES) and not isinstance(value, type):
            self._names.add("__call__")
            self._objects.append((label, value))

    def _follow_objects(self) -> None:
        """Add the attributes of objects that any code of the state may read, by name, and their methods."""
        done = 0
        while done != (done := len(self._names) + len(self._objects)):
            for label, value in list(self._objects):
                for live in (getattr(value, "__dict__", {}), *map(vars, type(value).__mro__)):
                    if is_foreign_home(str(live.get("__module__", "__main__"))):
                        self._read(label, live, self._names)


def shown(label: Label) -> str:
    """Write a label for a message, e.g. "layers.0.mlp.forward"."""
    return ".".join(str(part) for part in label if part != "") or "the decoder"


def _is_decoder_code(module: str) -> bool:
    return module.startswith(_DECODER_CODE) or is_foreign_home(module)


def _defined_in(value: Any, home: Mapping[str, Any]) -> bool:
    """Return True for a function of the same file, and for one that no library has defined."""
    found = function_of(value)
    if not isinstance(found, types.FunctionType):
        return False
    return found.__globals__ is home or is_foreign(found)


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes that code reads, and the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
