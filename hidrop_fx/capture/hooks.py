"""Hooks of modules: which run while a decoder is traced, and which can be no part of a graph.

check_hooks(decoder)            # raises for those that a graph cannot follow
announce_hooks(decoder)         # warns of the others: they run once, while the decoder is traced
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules

from hidrop_fx.errors import UnsupportedModelError

logger = logging.getLogger("hidrop_fx")

FORWARD, BACKWARD = (
    ("_forward_pre_hooks", "_forward_hooks"),
    ("_backward_pre_hooks", "_backward_hooks"),
)
_BOOKKEEPING = {
    "transformers.utils.output_capturing",
    "torch.utils.module_tracker",
    "torch.utils.flop_counter",
    "torch.distributed.tensor.debug._comm_mode",
    # FSDP2's, which run where layers are called as modules, and not while they are traced.
    "torch.distributed.fsdp._fully_shard._fsdp_common",
    "torch.distributed.fsdp._fully_shard._fsdp_state",
}

# By the function or the class of a hook; what it is, and what to do instead.
_REFUSED = {
    "_adapter_names_pre_forward_hook": (
        "adapter_names chooses an adapter for each row, and a graph computes all rows alike",
        "set_adapter(name) and one call for each adapter, or restore the model",
    ),
    "_alora_offsets_pre_forward_hook": (
        "an activated LoRA (aLoRA) begins at another token of each row, and a graph computes all tokens alike",
        "a LoRA without alora_invocation_tokens, or restore the model",
    ),
    "WeightNorm": (
        "weight_norm of torch.nn.utils writes the weight anew before each call",
        "torch.nn.utils.parametrizations.weight_norm, or torch.nn.utils.remove_weight_norm(module)",
    ),
    "SpectralNorm": (
        "spectral_norm of torch.nn.utils writes the weight anew before each call",
        "torch.nn.utils.parametrizations.spectral_norm, or torch.nn.utils.remove_spectral_norm(module)",
    ),
    "BasePruningMethod": (
        "torch.nn.utils.prune writes the weight anew before each call",
        "torch.nn.utils.prune.remove(module, name), which makes the pruning permanent",
    ),
}
_CONTEXT_PARALLEL = (
    "context parallelism splits each row over the processes, and a schedule scores and drops the tokens of whole rows",
    "fully_shard, which splits weights; HiDrop's rows are short behind the layers that drop tokens",
)
_REFUSED |= {
    # Of accelerate's Accelerator.prepare, and of torch's _ContextParallel.
    "_self_attn_pre_forward_hook": _CONTEXT_PARALLEL,
    "sdpa_input_fn": _CONTEXT_PARALLEL,
    "flex_input_fn": _CONTEXT_PARALLEL,
}
# Of accelerate, in a module's `_hf_hook`.
_REFUSED_OF_ACCELERATE = {
    "LayerwiseCastingHook": "casts the weights before and after each call",
    "CpuOffload": "moves the weights before each call",
    "UserCpuOffloadHook": "moves the weights before each call",
}


def is_bookkeeping(hook: Any) -> bool:
    """Return True for hooks by which libraries collect outputs, count calls and gather parameters."""
    home = getattr(function_of(hook), "__globals__", None) or {}
    return home.get("__name__", "") in _BOOKKEEPING or is_of_deepspeed(hook)


def is_of_deepspeed(hook: Any) -> bool:
    """Return True for hooks by which DeepSpeed gathers parameters and reduces gradients."""
    # Wrappers for profilers and against Dynamo among them, which hide the function itself.
    return str(getattr(hook, "__module__", None)).startswith("deepspeed.")


def function_of(hook: Any) -> Any:
    """Return the function behind partial applications and bound methods."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        else:
            return hook


def check_hooks(decoder: nn.Module) -> None:
    """Raise for hooks inside a decoder, its embedding aside, that a graph cannot follow.

    Raises:
        UnsupportedModelError: names the hook, its module, and what to do instead.
    """
    for path, module in _inside(decoder):
        for hook in _hooks(module, FORWARD):
            kinds = {function_of(hook), *type(hook).__mro__}
            for name, (reason, remedy) in _REFUSED.items():
                if any(getattr(kind, "__name__", "") == name for kind in kinds):
                    raise UnsupportedModelError(
                        f"{_shown(path, module)} has the hook {name}: {reason}. Instead: {remedy}"
                    )
        for hook in _hooks(module, BACKWARD):
            raise UnsupportedModelError(
                f"{_shown(path, module)} has the backward hook {described(hook)}, and a compiled decoder "
                "calls no module's backward. Remove it (the handle that register_full_backward_hook "
                "returned has remove()), or put a hook on the parameter (parameter.register_hook), which runs"
            )
        _check_accelerate(path, module)
    for table in ("_global_backward_pre_hooks", "_global_backward_hooks"):
        for hook in getattr(all_modules, table).values():
            if not is_bookkeeping(hook):
                raise UnsupportedModelError(
                    f"a backward hook of all modules is registered, {described(hook)}, and a compiled decoder "
                    "calls no module's backward. Remove it by its handle"
                )


def announce_hooks(decoder: nn.Module) -> None:
    """Log one warning that names the hooks which run no more once a decoder is captured."""
    found = [path or "the decoder" for path, module in _inside(decoder) if _hooks(module, FORWARD)]
    for table in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        hooks = getattr(all_modules, table).values()
        found += [f"all modules ({described(h)})" for h in hooks if not is_bookkeeping(h)]
    if found:
        logger.warning(
            "hooks on %s of the decoder do not run in a compiled model; what they changed while "
            "it was captured stays",
            ", ".join(found[:3]),
        )


def described(hook: Any) -> str:
    """Name a hook for a message, with the module of Python that it is from."""
    found = function_of(hook)
    kind = found if hasattr(found, "__qualname__") else type(found)
    return f"{kind.__module__}.{kind.__qualname__}"


def _inside(decoder: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a decoder with their paths; the embedding is called as a module, hooks and all."""
    embedding = set(map(id, decoder.get_input_embeddings().modules()))
    for path, module in decoder.named_modules():
        if id(module) not in embedding:
            yield path, module


def _hooks(module: nn.Module, tables: tuple[str, ...]) -> list[Any]:
    found = (hook for table in tables for hook in module.__dict__[table].values())
    return [hook for hook in found if not is_bookkeeping(hook)]


def _check_accelerate(path: str, module: nn.Module) -> None:
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # those of a SequentialHook
        name = type(one).__name__
        reason = _REFUSED_OF_ACCELERATE.get(name)
        if getattr(one, "no_grad", False):
            reason = "ends gradients"
        if reason is not None:
            raise UnsupportedModelError(
                f"{_shown(path, module)} has accelerate's {name}, which {reason}; a compiled decoder calls no "
                "module. Instead: accelerate.hooks.remove_hook_from_module(model, recurse=True), with all "
                "weights on the device of the model in the dtype to compute in"
            )


def _shown(path: str, module: nn.Module) -> str:
    return f"{path or 'the decoder'} ({type(module).__name__}) of the text decoder"
