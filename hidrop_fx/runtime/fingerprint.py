"""Tell if a decoder is still the one that was captured.

watch = DecoderSnapshot(decoder)
watch.key                       # equal for equal states
watch.unchanged()               # whether it would be the same now, in a fraction of the time

A captured graph holds what the decoder's Python code did once. So the following count, and a change of any
of them has the decoder captured again:

- the modules: which there are, where, of which classes; parameters and buffers as objects, their dtypes and
  devices. Values of tensors do not count: the graph reads them at each call;
- attributes of modules. Numbers, strings and the like are compared; lists, tuples, dictionaries and sets of up
  to a thousand elements by what they hold; other objects by identity;
- what classes bind: `forward`, `__call__`, methods, constants, of each class up to `nn.Module`, and there
  `__call__` and what it calls;
- functions by what they do: their code, defaults and closures; of bound methods and partial applications what
  they are bound to; of callable objects the attributes that their code reads. A function made anew from the
  same parts is the same;
- globals that functions of the modelling file read, and those of PEFT's layers and of code that is no library's,
  through the Python modules that they reach them by: `apply_rotary_pos_emb`, `F.silu`, `settings.SCALE`;
- hooks of modules and those of all modules; hooks by which libraries collect outputs and count calls aside;
- the text configuration, in place too; what the layers' code does not read aside (`use_cache`, token ids, ...);
- the attention function in force.

Not noticed are changes within the objects of libraries, in C, in files, in environment variables, in elements of
larger containers, and the time of day: of these, a graph keeps what it met.
"""

from collections.abc import Collection, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx.capture.hooks import is_bookkeeping
from hidrop_fx.capture.libraries import is_foreign
from hidrop_fx.capture.placement import offloads, placement_of
from hidrop_fx.capture.sharded import is_sharded, sharded_layouts
from hidrop_fx.runtime.python_state import (
    TABLES,
    Label,
    PythonState,
    shown,
)

_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_backward_pre_hooks", "_global_backward_hooks"),
)


class Fingerprint:
    """One state of modules, in thousands of parts, hashed once."""

    __slots__ = ("_hash", "_labels", "_parts")

    def __init__(self, labels: Iterable[Label], parts: Iterable[Any]) -> None:
        self._labels = tuple(labels)
        self._parts = tuple(parts)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts

    def differences(self, other: "Fingerprint") -> list[Label]:
        """Return where two states differ, each place once."""
        mine, theirs = self._by_label(), other._by_label()
        names = dict.fromkeys((*mine, *theirs))
        return [name for name in names if mine.get(name) != theirs.get(name)]

    def _by_label(self) -> dict[Label, list[Any]]:
        found: dict[Label, list[Any]] = {}
        for label, part in zip(self._labels, self._parts, strict=True):
            found.setdefault(label, []).append(part)
        return found


class ModuleSnapshot:
    """The state of modules and of the Python code that they run, and enough to see that it is the same.

    Args:
        modules: by path; each counts for itself, without its children.
        ignored: places whose values do not count, as `Fingerprint.differences` names them.
    """

    _left_out: tuple[str, ...] = ()
    """Tables of modules whose tensors do not count, since others stand there in each call."""

    def __init__(
        self, modules: dict[str, nn.Module], ignored: Collection[Label] = frozenset()
    ) -> None:
        state = PythonState(modules, ignored, left_out=self._left_out)
        self._watched = state.watched
        names = [name for name in TABLES if name not in self._left_out]
        tables = [module.__dict__[name] for module in modules.values() for name in names]
        tables += [getattr(all_modules, name) for name in _GLOBAL_HOOKS]
        self._types = list(map(type, modules.values()))
        self._modules = list(modules.values())
        self._empty = [values for values in tables if not values]
        self._filled = [values for values in tables if values]
        self._sizes = list(map(len, self._filled))
        self._objects = list(chain.from_iterable(map(dict.values, self._filled)))
        self._tensors = state.tensors
        self._places = _places(self._tensors)
        for name in _GLOBAL_HOOKS:
            for hook in getattr(all_modules, name).values():
                if not is_bookkeeping(hook):
                    state.value((name,), hook)
        self._note_more(state)
        self.key = Fingerprint(state.labels, state.parts)

    def unchanged(self) -> bool:
        """Return True if the modules are in the same state, and that is plain to see."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), self._objects))
            and all(map(is_, map(type, self._modules), self._types))
            and self._watched.unchanged()
            and _places(self._tensors) == self._places
        )

    def _note_more(self, state: PythonState) -> None:
        """Add what counts beside the modules."""


class DecoderSnapshot(ModuleSnapshot):
    """The state of a text decoder, its embedding aside: that is called as a module, hooks and all."""

    def __init__(self, decoder: Any, ignored: Collection[Label] = frozenset()) -> None:
        self.decoder = decoder
        self._embedding = decoder.get_input_embeddings()
        self._around = self._surroundings()
        embedded = set(map(id, self._embedding.modules()))
        modules = {n: m for n, m in decoder.named_modules() if id(m) not in embedded}
        super().__init__(modules, ignored)

    def unchanged(self) -> bool:
        """Return True if the decoder is in the same state, and that is plain to see."""
        return self._surroundings() == self._around and super().unchanged()

    def _surroundings(self) -> tuple[Any, ...]:
        table = self._embedding
        weight = table.weight if hasattr(table, "weight") else next(table.parameters())
        return weight.dtype, weight.device, attention_function(self.decoder)

    def _note_more(self, state: PythonState) -> None:
        *place, attention = self._around
        state.value(("embedding",), tuple(place))
        state.value(("attention",), attention if is_foreign(attention) else None)


class ShardedSnapshot(DecoderSnapshot):
    """The state of a decoder whose parameters FSDP2 shards: it puts others in their place whenever it gathers them."""

    _left_out = ("_parameters",)

    def _surroundings(self) -> tuple[Any, ...]:
        """Leave out the embedding, which is another tensor of another dtype while it is gathered."""
        return (attention_function(self.decoder),)

    def _note_more(self, state: PythonState) -> None:
        super()._note_more(state)
        state.value(("parameters",), tuple(name for name, _ in self.decoder.named_parameters()))
        state.value(("sharded parameters",), sharded_layouts(self.decoder))


class OffloadedSnapshot(DecoderSnapshot):
    """The state of a decoder whose weights hooks of accelerate load for each call: other tensors each time."""

    _left_out = ("_parameters", "_buffers")

    def _surroundings(self) -> tuple[Any, ...]:
        return (attention_function(self.decoder),)

    def _note_more(self, state: PythonState) -> None:
        super()._note_more(state)
        for kind in ("named_parameters", "named_buffers"):
            found = ((n, t.shape, t.dtype) for n, t in getattr(self.decoder, kind)())
            state.value((kind.replace("_", " "),), tuple(found))
        state.value(("placement",), str(placement_of(self.decoder)))


def snapshot_of(decoder: Any, ignored: Collection[Label] = frozenset()) -> DecoderSnapshot:
    """Return the state of a decoder, sharded or offloaded or neither."""
    if is_sharded(decoder):
        return ShardedSnapshot(decoder, ignored)
    kind = OffloadedSnapshot if any(map(offloads, decoder.modules())) else DecoderSnapshot
    return kind(decoder, ignored)


def fingerprint(decoder: Any) -> Fingerprint:
    """Return what a captured graph of a decoder depends on."""
    return snapshot_of(decoder).key


def attention_function(decoder: Any) -> Any:
    """Return the function that a decoder's configuration names as its attention; None for its own eager one."""
    return ALL_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)


def described(places: list[Label]) -> str:
    """Name the first of some places, and how many more there are."""
    if not places:  # the same parts in another order
        return "the order of its modules"
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{shown(places[0])}{more}"


def _places(tensors: list[Tensor]) -> list[Any]:
    return list(map(attrgetter("dtype", "device"), tensors))
