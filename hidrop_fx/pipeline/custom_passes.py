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
from typing import Any

import hidrop_fx.passes as builtin
from hidrop_fx.errors import PassError
from hidrop_fx.program.passes import Pass, pass_name
from hidrop_fx.program.program import Program

# Filled by every call, and not in every program: a pass may add it.
_FILLED = {"query_columns"}
# Outputs of built-in passes.
_TAKEN = ("columns_", "states_", "layer_", "features")


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
        PassError: it adds an input without declaring how calls fill it, an output under a name that is taken, or drops
            "hidden" from what the program returns.
    """
    inputs = set(program.inputs) | _FILLED
    program.apply(pass_fn)
    name = pass_name(pass_fn)
    added = [
        known for known in program.inputs if known not in inputs and known not in program.specs
    ]
    if added:
        raise PassError(
            f"the pass {name} adds the input {added[0]!r}, which no call of the model fills; declare it with "
            f"program.add_input(InputSpec(...)), or compute it from {', '.join(sorted(inputs))}"
        )
    if "hidden" not in program.outputs:
        raise PassError(
            f'after the pass {name} the program no longer returns "hidden"; begin with '
            "program.returns({**program.outputs, ...})"
        )
    program.extras = tuple(known for known in program.outputs if known != "hidden")
    taken = [known for known in program.extras if known.startswith(_TAKEN)]
    if taken:
        raise PassError(
            f"the pass {name} returns {taken[0]!r}, a name that is taken; choose another"
        )


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
