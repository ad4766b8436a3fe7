"""Follow hidden states through the code of a forward, from the text decoder to the head: nothing may be done to them.

    outputs = self.language_model(...)                  # a base model
    return Output(last_hidden_state=outputs.last_hidden_state)

    outputs = self.model(input_ids=input_ids, ...)      # the class with its head
    hidden_states = outputs[0]
    logits = self.lm_head(hidden_states[:, slice_indices, :])

What is done behind the head is found by `hidrop_fx.models.forward_code.logit_steps`.
"""

import ast
from collections.abc import Iterator

_INPUTS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", "pixel_values_videos",
}  # fmt: skip
_OF_OUTPUTS = ("", "[0]", ".last_hidden_state", "['last_hidden_state']")


def check_before_head(forward: ast.FunctionDef) -> None:
    """Check that a class hands its arguments to its base model, and that model's rows to its head.

    Raises:
        ValueError: it does not.
    """
    assigned = _values(forward)
    for call in ast.walk(forward):
        if not isinstance(call, ast.Call):
            continue
        if ast.unparse(call.func) == "self.lm_head":
            for states in call.args[:1]:
                if not _is_returned(states, assigned, set()):
                    raise ValueError(f"from {_told(states, assigned)}")
        elif ast.unparse(call.func) == "self.model":
            for name in sorted(_INPUTS & assigned.keys()):
                raise ValueError(
                    f"its base model is given {name} = {ast.unparse(assigned[name][0])}"
                )
            for word in call.keywords:
                if word.arg in _INPUTS and ast.unparse(word.value) != word.arg:
                    raise ValueError(
                        f"its base model is given {word.arg}={ast.unparse(word.value)}"
                    )


def _values(forward: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Return what is assigned to each name, one after another."""
    found: dict[str, list[ast.expr]] = {}
    for target, value in assigned_in(forward):
        found.setdefault(target, []).append(value)
    return found


def _is_returned(states: ast.expr, assigned: dict[str, list[ast.expr]], seen: set[str]) -> bool:
    """Return True for `outputs[0]`, `outputs.last_hidden_state`, names for these, and some of their rows."""
    match states:
        case ast.Name(id=name):
            if any(target.startswith(f"{name}[") for target in assigned):
                return False  # some of their places are written
            values = assigned.get(name, [])
            return name in seen or (
                bool(values) and all(_is_returned(v, assigned, seen | {name}) for v in values)
            )
        case ast.Attribute(value=ast.Name(), attr="last_hidden_state"):
            return True
        case ast.Subscript(value=ast.Name(id=name)):
            calls = [isinstance(value, ast.Call) for value in assigned.get(name, [])]
            if ast.unparse(states.slice) == "0" and calls and all(calls):
                return True
            return _is_returned(states.value, assigned, seen)
        case ast.Call(func=ast.Name(id="slice_logits_to_keep"), args=[first, *_]):
            return _is_returned(first, assigned, seen)
    return False


def _told(states: ast.expr, assigned: dict[str, list[ast.expr]]) -> str:
    values = assigned.get(ast.unparse(states), [])
    odd = [v for v in values if not _is_returned(v, assigned, {ast.unparse(states)})]
    return ast.unparse(odd[0] if odd else states)


def changes_states(forward: ast.FunctionDef, calls: list[ast.Call]) -> bool:
    """Return True if what a text decoder returned is changed, or something else is returned in its place."""
    assigned = _values(forward)
    outputs = {name for name, values in assigned.items() if any(v in calls for v in values)}
    own = {f"{name}{part}" for name in outputs for part in _OF_OUTPUTS}
    if any(value not in calls for name in own & assigned.keys() for value in assigned[name]):
        return True
    returned = (
        word.value
        for call in ast.walk(forward)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if word.arg == "last_hidden_state"
    )
    return not all(_is_returned(states, assigned, set()) for states in returned)


def assigned_in(forward: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield each target as text, and its value; of `x += y`, `x + y`."""
    for node in ast.walk(forward):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                for part in parts:
                    yield ast.unparse(part), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, ast.AugAssign):
            read = ast.parse(ast.unparse(node.target), mode="eval").body
            yield ast.unparse(node.target), ast.BinOp(left=read, op=node.op, right=node.value)
