"""Where the parts of a decoder lie: on several devices, or elsewhere until a hook of accelerate loads them.

    found = placement_of(decoder)                # None: everything on one device
    with shown_on(found.entry, decoder):         # as if all of it were there
        captured = capture(decoder)

`device_map` (accelerate's `dispatch_model`, `cpu_offload`, `disk_offload`) puts modules on devices and gives each a hook that
moves what it is called with. Offloaded weights are on the meta device outside of their modules' calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from hidrop_fx.capture.layers import embedding_table, final_norm, layer_list
from hidrop_fx.capture.quantised import is_quantised
from hidrop_fx.capture.stand_ins import stand_in
from hidrop_fx.errors import UnsupportedModelError

HOOK, REPLACED = "_hf_hook", "_old_forward"
"""Attributes of a module: accelerate's hook, and the forward in whose place accelerate's own calls it."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The devices that a decoder computes on."""

    entry: torch.device
    """That of the token embedding: what a program is given lies there."""
    layers: tuple[torch.device, ...]
    norm: torch.device
    """That of the final norm."""
    offloaded: bool
    """Hooks load weights for each call of their modules."""

    @property
    def spread(self) -> bool:
        """True if there are several."""
        return len({self.entry, *self.layers, self.norm}) > 1

    def __str__(self) -> str:
        names = dict.fromkeys(map(str, (self.entry, *self.layers, self.norm)))
        where = f"runs on {', '.join(names)}"
        return f"{where}, its weights loaded for each call" if self.offloaded else where


def placement_of(decoder: Any) -> Placement | None:
    """Return where a decoder computes; None where all of it lies on one device.

    Raises:
        UnsupportedModelError: a weight has no values and no hook loads it, a layer is spread over several devices itself, or
            a weight is quantised beside others that are offloaded.
    """
    devices = {tensor.device for tensor in decoder.parameters()}
    if len(devices) == 1 and next(iter(devices)).type != "meta":
        return None
    check_values(decoder)
    path, layers = layer_list(decoder)
    norm = final_norm(decoder)
    return Placement(
        entry=home(decoder),
        layers=tuple(_device_of(f"{path}.{k}", layer, decoder) for k, layer in enumerate(layers)),
        norm=_device_of(_path_of(norm, decoder), norm, decoder),
        offloaded=any(map(offloads, decoder.modules())),
    )


def home(decoder: Any) -> torch.device:
    """Return the device on which a decoder's token embedding computes."""
    table = embedding_table(decoder)
    if not table.is_meta:
        return table.device
    found = [execution_device(module) for module in decoder.get_input_embeddings().modules()]
    return next((device for device in found if device is not None), table.device)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks of a module, those of a sequence one by one."""
    hook = module.__dict__.get(HOOK)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))


def offloads(module: nn.Module) -> bool:
    """Return True for a module whose weights a hook loads for each call, and drops behind it."""
    return any(getattr(hook, "offload", False) for hook in hooks_of(module))


def moves_inputs(module: nn.Module) -> bool:
    """Return True for a module whose only hooks move weights and what it is called with between devices."""
    hooks = hooks_of(module)
    return bool(hooks) and all(type(hook).__name__ == "AlignDevicesHook" for hook in hooks)


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which a module's hooks move what it is called with; None without such hooks."""
    found = [getattr(hook, "execution_device", None) for hook in hooks_of(module)]
    given = next((device for device in found if device is not None), None)
    return None if given is None else torch.empty(0, device=given).device


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of a module and of those inside it, by their own hooks; drop them behind."""
    entered: list[nn.Module] = []
    try:
        for each in module.modules():
            if offloads(each):
                each.__dict__[HOOK].pre_forward(each)
                entered.append(each)
        yield
    finally:
        for each in reversed(entered):
            each.__dict__[HOOK].post_forward(each, None)


@contextmanager
def shown_on(device: torch.device, decoder: nn.Module) -> Iterator[None]:
    """Show plain tensors on one device in the place of those that are not there, and no forward of accelerate's.

    They take no memory. Their values mean nothing: a trace reads none.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []
    shown: dict[int, Tensor] = {}
    try:
        for module in decoder.modules():
            values = module.__dict__
            if HOOK in values and REPLACED in values and "forward" in values:
                undo.append((values, "forward", values["forward"]))
                before = values[REPLACED]
                if _is_own(module, before):
                    del values["forward"]
                else:
                    values["forward"] = before
            for table in ("_parameters", "_buffers"):
                tensors = values[table]
                for name, tensor in list(tensors.items()):
                    if tensor is not None and tensor.device != device:
                        undo.append((tensors, name, tensor))
                        if id(tensor) not in shown:
                            shown[id(tensor)] = stand_in(tensor, device=device)
                        tensors[name] = shown[id(tensor)]
        yield
    finally:
        for values, name, value in reversed(undo):
            values[name] = value


def stand_where_they_run(module: fx.GraphModule, decoder: Any, placement: Placement) -> None:
    """Put stand-ins on the device of their layer in the place of those on the entry's, in a captured graph."""
    layers = layer_list(decoder)[0]
    norm = _path_of(final_norm(decoder), decoder)
    names = set(names_looked_up(decoder))
    for name in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
        if name not in names:
            continue
        device = placement.entry
        if name.startswith(f"{layers}."):
            device = placement.layers[int(name[len(layers) + 1 :].partition(".")[0])]
        elif name.startswith(f"{norm}."):
            device = placement.norm
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        tensors: dict[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
        tensors[last] = stand_in(tensors[last], device=device)


def names_looked_up(decoder: nn.Module) -> Iterator[str]:
    """Yield the paths of parameters, and of buffers that are offloaded too: each is another tensor in every call."""
    for name, _ in decoder.named_parameters(remove_duplicate=False):
        yield name
    for name, buffer in decoder.named_buffers(remove_duplicate=False):
        if buffer.is_meta:
            yield name


def check_values(decoder: nn.Module) -> None:
    """Raise for weights without values that no hook loads, and for a quantised one beside offloaded ones.

    Raises:
        UnsupportedModelError: names the weight, and what to do instead.
    """
    reached = _loaded_modules(decoder)
    for path, module in decoder.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            where = f"{path}.{name}".lstrip(".")
            if tensor.is_meta and id(module) not in reached:
                raise UnsupportedModelError(
                    f"{where} of the text decoder has no values (it is on the meta device, as in models made under "
                    "init_empty_weights, and no hook of accelerate loads it); load the model whole, with "
                    "device_map={'': 0} or without device_map"
                )
            if reached and is_quantised(tensor):
                raise UnsupportedModelError(
                    f"{where} of the text decoder is a quantised weight of a model that accelerate offloads in part; "
                    "use one of the two"
                )


def _loaded_modules(decoder: Any) -> set[int]:
    """Return the ids of modules whose tensors hooks load where a compiled model runs them.

    Their own hooks, or one of a module around them that it calls: a layer, the final norm, the embedding, or one in these.
    """
    found: set[int] = set()
    for module in decoder.modules():
        if any(
            getattr(hook, "offload", False) and not _is_for_all(hook) for hook in hooks_of(module)
        ):
            found.add(id(module))
    for called in (*layer_list(decoder)[1], final_norm(decoder), decoder.get_input_embeddings()):
        for module in called.modules():
            if any(
                getattr(hook, "offload", False) and _is_for_all(hook) for hook in hooks_of(module)
            ):
                found |= set(map(id, module.modules()))
    return found


def _is_for_all(hook: Any) -> bool:
    """Return True for a hook that loads the tensors of the modules inside its own too (`preload_module_classes`)."""
    return bool(getattr(hook, "place_submodules", False))


def _device_of(path: str, module: nn.Module, decoder: Any) -> torch.device:
    """Return the one device on which a module of a decoder computes."""
    found: dict[torch.device, str] = {}
    for name, each in module.named_modules():
        for own, parameter in each._parameters.items():
            if parameter is not None:
                device = parameter.device
                if parameter.is_meta:
                    device = execution_device(each) or execution_device(module) or device
                found.setdefault(device, f"{name}.{own}".lstrip("."))
    if len(found) > 1:
        shown = " and ".join(f"{name} on {device}" for device, name in list(found.items())[:2])
        raise UnsupportedModelError(
            f"{path} of the text decoder is spread over several devices itself ({shown}), and a compiled layer runs on one. "
            "Name whole layers in device_map; accelerate's infer_auto_device_map keeps those whole that "
            "no_split_module_classes names"
        )
    return next(iter(found), home(decoder))


def _path_of(module: nn.Module, decoder: nn.Module) -> str:
    return next(path for path, each in decoder.named_modules() if each is module)


def _is_own(module: nn.Module, forward: Any) -> bool:
    own: Any = type(module).forward
    return type(forward) is MethodType and forward.__func__ is own
