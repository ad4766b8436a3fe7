"""Custom passes: those that a user gives to `compile`, beside the built-in ones.

    hidrop_fx.compile(model, schedule, passes=[my_pass])

    program.apply(my_pass)                  # in every program: prefill, train and decode
    check_lengths(program)                  # here, so that an error names the pass at fault

They run once all token sets exist, and before attention, buffers and head: the layers' attention is still
the captured one, and `program.outputs` has "hidden" alone. Outputs that they add go to the caller.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

import hidrop_fx.passes as builtin
from hidrop_fx.errors import InputError, PassError
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.outputs import RESERVED
from hidrop_fx.program.pass_function import Pass, pass_name
from hidrop_fx.program.program import Program


def checked_passes(given: Any) -> tuple[Pass, ...]:
    """Return the argument `passes` as a tuple.

    Raises:
        PassError: it is no sequence of functions, each with a name of its own.
    """
    if callable(given) or isinstance(given, str) or not isinstance(given, Iterable):
        raise PassError(f"passes={given!r}; give a list of functions, passes=[my_pass]")
    found: list[Pass] = []
    for pass_fn in given:
        if not callable(pass_fn):
            raise PassError(
                f"passes holds {pass_fn!r}, a {type(pass_fn).__name__}; a pass is a function "
                "(program, plan) -> PassResult"
            )
        name = pass_name(pass_fn)
        if not name.isidentifier():
            raise PassError(
                f"the pass {pass_fn!r} has no name to call it by in history, dumps and errors; define it with "
                "`def name(program, plan)`, or set its __name__"
            )
        if name in (*builtin.__all__, "captured", *map(pass_name, found)):
            raise PassError(
                f"passes holds a second {name!r}: there is a pass of that name already; rename it, or set "
                "its __name__"
            )
        found.append(pass_fn)
    return tuple(found)


def apply_custom(program: Program, pass_fn: Pass) -> None:
    """Run a custom pass, and check what built-in passes are tested for.

    Raises:
        PassError: it adds an input that it does not declare, an output under a name that is taken, or
            drops "hidden" from what the program returns.
    """
    inputs = set(program.inputs)
    program.apply(pass_fn)
    name = pass_name(pass_fn)
    added = [known for known in program.inputs if known not in inputs]
    for known in added:
        if known not in program.specs:
            raise PassError(
                f"the pass {name} adds the input {known!r}, which no call of the model fills; declare it with "
                "program.add_input(hidrop_fx.InputSpec(name, dims, dtype, fill))"
            )
        program.specs[known] = _checked(program.specs[known], name)
    if "hidden" not in program.outputs:
        raise PassError(
            f'after the pass {name} the program no longer returns "hidden"; begin with '
            "program.returns({**program.outputs, ...})"
        )
    program.extras = tuple(known for known in program.outputs if known != "hidden")
    taken = [known for known in program.extras if known.startswith(RESERVED)]
    if taken:
        raise PassError(
            f"the pass {name} returns {taken[0]!r}, a name that is taken; choose another"
        )


def _checked(spec: InputSpec, pass_name: str) -> InputSpec:
    """Return the declaration with a `fill` that checks what the pass's own returns."""
    return replace(spec, fill=partial(_fill_checked, spec=spec, pass_name=pass_name))


def _fill_checked(call: Any, *, spec: InputSpec, pass_name: str) -> Tensor:
    """Fill a custom input.

    Raises:
        InputError: its `fill` failed, or returned no tensor of the declared dtype and dimensions.
    """
    try:
        value = spec.fill(call)
    except Exception as error:
        raise InputError(
            f"the input {spec.name!r} of the pass {pass_name} could not be filled: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = type(value).__name__
    if isinstance(value, Tensor):
        known = _sizes(call)
        fits = len(value.shape) == len(spec.dims) and all(
            known.get(dim, size) == size if isinstance(dim, str) else dim == size
            for dim, size in zip(spec.dims, value.shape, strict=True)
        )
        if fits and value.dtype == spec.dtype:
            return value
        found = f"{value.dtype} {list(value.shape)}"
    raise InputError(
        f"the input {spec.name!r} of the pass {pass_name} was declared as {spec.dtype} "
        f"[{', '.join(map(str, spec.dims))}], but its fill returned {found}"
    )


def _sizes(call: Any) -> dict[str, int]:
    """Return the named sizes that a call has settled."""
    layout = getattr(call, "layout", None)
    if layout is None:
        batch, tokens = call.embeds.shape[:2]
        return {"batch": batch, "tokens": tokens}
    return {"batch": len(layout.last), "columns": layout.columns + 1, **layout.lengths}


def names_of(passes: Sequence[Pass]) -> str:
    """Return the names in order; "none" without any."""
    return ", ".join(map(pass_name, passes)) or "none"


def sources_of(passes: Sequence[Pass]) -> str:
    """Return a digest of the passes' own code; "none" without any."""
    digest = hashlib.sha256()
    for pass_fn in passes:
        digest.update(_source(pass_fn) + b"\0")
    return digest.hexdigest()[:16] if passes else "none"


def _source(pass_fn: Any) -> bytes:
    if isinstance(pass_fn, functools.partial):
        given = repr((pass_fn.args, sorted(pass_fn.keywords.items())))
        return _source(pass_fn.func) + given.encode()
    try:
        return inspect.getsource(pass_fn).encode()
    except (OSError, TypeError):  # typed in, or made by exec
        code = getattr(pass_fn, "__code__", None)
        if code is None:
            return repr(type(pass_fn)).encode()
        return code.co_code + repr((code.co_names, code.co_consts)).encode()
