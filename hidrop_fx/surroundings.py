"""Independence of tracing and lowering from the surroundings of the call that they happen in.

    with neutral_surroundings():
        captured = capture(decoder)

A decoder is traced, and its programs are made, inside the first call that needs them. Whatever that call runs
under (a mode that counts or logs operators, a default device or dtype, autocast, warnings as errors, ...)
would enter a graph that later calls share.
"""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

from hidrop_fx.errors import InputError

# Looked up once: every layer of every call asks.
_dispatch_modes = torch._C._len_torch_dispatch_stack
# Emptied in place: the handles of the hooks refer to these dictionaries.
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    getattr(torch.nn.modules.module, f"_global_{name}")
    for name in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
)
# Modules of torch, by release, that note under `context_parallel` which function of attention gave way.
_CONTEXT_PARALLEL = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")


@contextmanager
def neutral_surroundings() -> Iterator[None]:
    """Trace as in a fresh process, under `torch.no_grad()`; restore everything behind, also on failure.

    Dispatch and function modes, hooks of all modules, default device and dtype, autocast, deterministic, inference and anomaly
    mode are off; a warning is no error; the random state stays as it was.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_function_modes())
        stack.enter_context(_without_dispatch_modes())
        stack.enter_context(_without_module_hooks())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_switches())
        stack.enter_context(_linear_of_torch())
        stack.enter_context(warnings_are_no_errors())
        stack.enter_context(random_state_kept())
        yield


@contextmanager
def _linear_of_torch() -> Iterator[None]:
    """Show torch's own `torch.nn.functional.linear`, in whose place ZeRO-3 puts a function with a backward of its own."""
    found: Any = torch.nn.functional.linear
    if not str(getattr(found, "__module__", None)).startswith("deepspeed."):
        yield
        return
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = found


@contextmanager
def warnings_are_no_errors() -> Iterator[None]:
    """Print warnings that filters would raise: those of a compiler about itself must not end a call."""
    with warnings.catch_warnings():
        if any(action == "error" for action, *_ in warnings.filters):
            filters = [
                ("default", *rest) if a == "error" else (a, *rest) for a, *rest in warnings.filters
            ]
            warnings.resetwarnings()
            warnings.filters[:] = filters  # type: ignore[index]
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, of the CPU and of every CUDA device that is in use."""
    drawn, state = random.getstate(), torch.random.default_generator.get_state()
    devices: Any = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    on_devices = [torch.cuda.get_rng_state(index) for index in devices]
    try:
        yield
    finally:
        random.setstate(drawn)
        torch.random.default_generator.set_state(state)
        for index, kept in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(kept, index)


def in_dispatch_mode() -> bool:
    """Return True under a dispatch mode that is to see every operator, e.g. `FlopCounterMode`.

    torch.compile does not compile there. Modes of the infrastructure, which make devices or fake tensors, do not count.
    """
    count = _dispatch_modes()
    if not count:
        return False
    modes = map(torch._C._get_dispatch_stack_at, range(count))
    return any(not (mode.is_infra_mode() or mode.ignore_compile_internals()) for mode in modes)


def has_default_device() -> bool:
    """Return True if the only function mode is a default device, which no program depends on."""
    if _len_torch_function_stack() != 1:
        return False
    return isinstance(torch._C._get_function_stack_at(0), DeviceContext)


def has_function_modes() -> bool:
    """Return True under a function mode other than a default device."""
    return _len_torch_function_stack() > 0 and not has_default_device()


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Leave the function modes of this thread; the default device is one."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def check_surroundings() -> None:
    """Check that calls can run here.

    Raises:
        InputError: under a transform of torch.func, context parallelism, or a mode whose tensors have no data.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "a compiled model was called inside a transform of torch.func (grad, vmap, jvp, ...): it works the "
            "layout of a batch out on the host, which a transform cannot follow. Call loss.backward(), or "
            "hidrop_fx.restore(model) first"
        )
    for name in _CONTEXT_PARALLEL:
        module = sys.modules.get(name)
        replaced: Any = getattr(module, "_replaced_functions", ())
        if replaced and torch.nn.functional.scaled_dot_product_attention in replaced:
            raise InputError(
                "a compiled model was called inside context_parallel of torch.distributed, which splits each row over the "
                "processes: a schedule scores and drops the tokens of whole rows. Leave the context, and shard the weights with "
                "torch.distributed.fsdp.fully_shard"
            )
    if _dispatch_modes():
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if mode is not None:
            raise InputError(
                "a compiled model was called under a FakeTensorMode (as torch.export has one, and with it "
                "torch.distributed.pipelining, which splits what it exports), whose tensors have no data: which tokens "
                "are an image's is read off input_ids. hidrop_fx.plan(schedule, model) gives costs without a call"
            )


@contextmanager
def _without_dispatch_modes() -> Iterator[None]:
    """Leave the dispatch modes of this thread, but for those without which a device is not there."""
    with _python_dispatch._disable_current_modes() as modes:
        needed = [m for m in modes if m.is_infra_mode() and getattr(m, "_mode_key", None) is None]
        for mode in reversed(needed):
            _python_dispatch._push_mode(mode)
        try:
            yield
        finally:
            for _ in needed:
                _python_dispatch._pop_mode()


@contextmanager
def _without_module_hooks() -> Iterator[None]:
    """Keep hooks of all modules of the process, such as a FLOP counter's, from following what is traced."""
    kept = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS]
    for hooks in _GLOBAL_HOOKS:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextmanager
def _switches() -> Iterator[None]:
    """Set default dtype, autocast and deterministic mode to what a process begins with."""
    dtype = torch.get_default_dtype()
    casting = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        for device in casting:
            torch.set_autocast_enabled(device, False)
        # Not use_deterministic_algorithms, which sets options of Inductor too.
        torch._C._set_deterministic_algorithms(False)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for device in casting:
            torch.set_autocast_enabled(device, True)
        torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
