"""Read off a class's own forward what it does beyond the common course, so that nothing is left out silently.

    inputs_embeds = embed(input_ids)                                   # the common course of a base model
    inputs_embeds = inputs_embeds.masked_scatter(mask, features)
    hidden = self.language_model(inputs_embeds, position_ids, attention_mask, past_key_values)

    logits = self.lm_head(hidden)                                      # and of the class with its head

Whatever else is assigned to these names, or handed to the text decoder, is a step that a family must declare
(`Family.declares`), or a compiled model would compute something else than its class.
"""

import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor

from hidrop_fx.models.forward_states import assigned_in, changes_states, check_before_head

EMBEDDINGS = "embeddings"
POSITION_IDS = "position_ids"
MASKS = "masks"
WORDS = "words"
STATES = "states"
ROUTERS = "output_router_logits"
"""Output of a decoder with experts; a call that asks for it is refused."""

_DECODERS = {"language_model", "text_model"}
COMMON = {
    "input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "cache_position", "logits_to_keep",
}  # fmt: skip
"""Arguments of a text decoder that programs stand in for."""
# Expressions of the common course, as `ast.unparse` writes them.
_EMBEDS = (".get_input_embeddings()(", ".embed_tokens(", "self.inputs_merger(")
_OTHER_WORDS = re.compile(r"\.(get_input_embeddings\(\)|embed_tokens)\((?!input_ids\b)")
_SCATTER = re.compile(
    r"inputs_embeds\.masked_scatter\(\w+(\.\w+\([^()]*\))?, \w+(\.to\([^()]*\))?\)"
)
_HANDED = {
    "inputs_embeds": EMBEDDINGS,
    "input_ids": WORDS,
    "attention_mask": MASKS,
    "position_ids": POSITION_IDS,
}
_COUNTED = ("self.compute_3d_position_ids(", "torch.arange(")


@cache
def steps_of(base: Any) -> tuple[str, ...]:
    """Return the names of the steps in a base model's forward that are beyond the common course.

    `"embeddings"`, `"position_ids"` and `"masks"` where it changes these in another way, `"words"` where it
    embeds other ids than it was given, `"states"` where it changes what its text decoder returns, the name of each
    further argument that it hands to that, and what it hands to an encoder in the place of an argument of its own.

    Raises:
        ValueError: it calls no text decoder under a name that is known.
    """
    forward = _forward(base)
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and _is_decoder(node)]
    if not calls:
        raise ValueError(f"{base.__name__}.forward calls no {' or '.join(sorted(_DECODERS))}")
    found: list[str] = []
    for target, value in _assignments(forward):
        if target.startswith("inputs_embeds") and not _is_common_embedding(target, value):
            found.append(EMBEDDINGS)
        elif target == "inputs_embeds" and _OTHER_WORDS.search(value):
            found.append(WORDS)
        elif target == "position_ids" and not _is_counted(value):
            found.append(POSITION_IDS)
        elif target == "attention_mask":
            found.append(MASKS)
        elif target == "input_ids" or target.startswith("input_ids["):
            found.append(WORDS)
    for call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}
        for name, step in _HANDED.items():
            if given.get(name, name) not in (name, "None"):
                found.append(step)
        found += [name for name in given if name not in COMMON and name != ROUTERS]
        found += [text for text in map(ast.unparse, call.args) if text not in COMMON]
        more = (f"**{ast.unparse(word.value)}" for word in call.keywords if not word.arg)
        found += [text for text in more if text != "**kwargs"]
    if changes_states(forward, calls):
        found.append(STATES)
    found += _encoded_apart(forward)
    return tuple(dict.fromkeys(found))


@cache
def encoder_arguments(base: Any, method: str) -> dict[str, str]:
    """Return which arguments of a forward go to its encoder `method`, by the encoder's names; none without a call."""
    forward = _forward(base)
    own = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)}
    parameters = list(inspect.signature(getattr(base, method)).parameters)[1:]
    for call in ast.walk(forward):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{method}":
            given = [*zip(parameters, call.args, strict=False)]
            given += [(word.arg, word.value) for word in call.keywords if word.arg]
            return {
                name: value.id
                for name, value in given
                if isinstance(value, ast.Name) and value.id in own
            }
    return {}


@cache
def first_alone(base: Any, method: str) -> frozenset[str]:
    """Return the arguments of a forward of which its encoder `method` gets the first entry alone, `pixel_values[:1]`."""
    calls = (node for node in ast.walk(_forward(base)) if isinstance(node, ast.Call))
    found = (call for call in calls if ast.unparse(call.func) == f"self.{method}")
    values = (value for call in found for value in (*call.args, *(w.value for w in call.keywords)))
    return frozenset(name for name in map(_whose_first, values) if name)


def _whose_first(value: ast.expr) -> str | None:
    text = ast.unparse(value)
    return (
        text.removesuffix("[:1]")
        if isinstance(value, ast.Subscript) and text.endswith("[:1]")
        else None
    )


@cache
def arguments_read(base: Any) -> frozenset[str]:
    """Return the arguments of a forward that its code reads, beyond handing them to the class's base model."""
    forward = _forward(base)
    named = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)} - {"self"}
    calls = (node for node in ast.walk(forward) if isinstance(node, ast.Call))
    base_calls = [call for call in calls if ast.unparse(call.func) == "self.model"]
    handed = {id(word) for call in base_calls for word in ast.walk(call)}
    names = (n for n in ast.walk(forward) if isinstance(n, ast.Name) and id(n) not in handed)
    return frozenset(named & {node.id for node in names if isinstance(node.ctx, ast.Load)})


def sees_both_ways(decoder: Any, config: Any) -> bool:
    """Return True if a text decoder makes masks that are not causal, as its config has it."""
    return getattr(config, "use_bidirectional_attention", False) is True and _asks_config(decoder)


@cache
def _asks_config(decoder: Any) -> bool:
    return "use_bidirectional_attention" in inspect.getsource(inspect.unwrap(decoder.forward))


@cache
def logit_steps(cls: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """Return what a class does to the rows that its head gives, as a function of the model and them.

    It is the class's own code, from the head to the loss, compiled. None where these rows are the logits.

    Raises:
        ValueError: this code reads other values of the forward, the head is given something else than rows of what the
            base model returns, or this is given something else than the forward is; the message names them.
    """
    head = _Head()
    body: list[ast.stmt] = []
    forward = _forward(cls)
    check_before_head(forward)
    for statement in forward.body:
        if body and ast.unparse(statement).startswith(("loss = None", "if labels", "return")):
            break
        new = head.visit(statement)
        if head.found:
            body.append(new)
    if not body:
        raise ValueError("no call of self.lm_head")
    if len(body) == 1 and ast.unparse(body[0]) == "logits = _rows":
        return None
    scope = dict(vars(sys.modules[cls.__module__]))
    names = [n for s in body for n in ast.walk(s) if isinstance(n, ast.Name)]
    written = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    known = written | {"self", "_rows"} | set(scope) | set(dir(builtins))
    unknown = sorted({n.id for n in names} - known)
    if unknown:
        raise ValueError(f"logits that depend on {', '.join(unknown)}")
    module = ast.parse("def steps(self, _rows): pass")
    function = module.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [*body, *ast.parse("return logits", mode="exec").body]
    exec(compile(ast.fix_missing_locations(module), f"<{cls.__name__}.forward>", "exec"), scope)
    steps: Callable[[Any, Tensor], Tensor] = scope["steps"]
    return steps


class _Head(ast.NodeTransformer):
    """Puts the name `_rows` in the place of a call of the head."""

    found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) == "self.lm_head":
            self.found = True
            return ast.Name("_rows", ast.Load())
        return self.generic_visit(node)


def _encoded_apart(forward: ast.FunctionDef) -> list[str]:
    """Return what an encoder is given that is no argument of the forward, but made of one."""
    own = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)} - {"self"}
    found = []
    for call in ast.walk(forward):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in _ENCODERS:
            continue
        for value in (*call.args, *(word.value for word in call.keywords if word.arg)):
            names = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)} & own
            known = isinstance(value, ast.Name) or _only_cast(value) or _whose_first(value) in own
            if names and not known:
                found.append(ast.unparse(value))
    return found


_ENCODERS = ("self.get_image_features", "self.get_video_features")


def _only_cast(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "to"
        and isinstance(value.func.value, ast.Name)
    )


def _forward(cls: Any) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    found = ast.parse(source).body[0]
    assert isinstance(found, ast.FunctionDef)
    return found


def _assignments(forward: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    for target, value in assigned_in(forward):
        yield target, ast.unparse(value)


def _is_decoder(call: ast.Call) -> bool:
    path = ast.unparse(call.func).split(".")
    return path[0] == "self" and path[-1] in _DECODERS


def _is_common_embedding(target: str, value: str) -> bool:
    if target != "inputs_embeds":
        return False
    scatter = _SCATTER.fullmatch(value)
    return scatter is not None or any(embeds in value for embeds in _EMBEDS)


def _is_counted(value: str) -> bool:
    return value == "position_ids.unsqueeze(0)" or value.startswith(_COUNTED)
