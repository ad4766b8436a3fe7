"""The snapshot of a decoder notices what a captured graph depends on."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama

from hidrop_fx.runtime.fingerprint import DecoderSnapshot, described
from tests.support.models import tiny_llava

Change = Callable[[Any], Any]

STRENGTH = 1.0  # read by `scaled`, below


def scaled(output: Tensor) -> Tensor:
    return output * STRENGTH


class Scale:
    """A hook that is an object, and reads its own attribute by way of a method."""

    def __init__(self) -> None:
        self.factor = 2.0
        self.notes: list[str] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.apply(output)

    def apply(self, output: Tensor) -> Tensor:
        return output * self.factor

    def method(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.factor


class Wrapper(nn.Module):
    """A layer of one's own around another."""

    factor = 1.0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.table = {"a": [1.0, 2.0]}

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.inner(x)) * self.factor * self.table["a"][0]


@pytest.fixture
def decoder() -> Any:
    return tiny_llava("llama", num_layers=2).get_decoder()


@pytest.fixture(autouse=True)
def _classes_stay_as_they_are() -> Iterator[None]:
    """Put back what a change has bound in a class or a file."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (modeling_llama.LlamaMLP, "forward"),
            (modeling_llama.LlamaRMSNorm, "forward"),
            (modeling_llama, "rotate_half"),
            (modeling_llama, "apply_rotary_pos_emb"),
            (modeling_llama.LlamaAttention.forward, "__code__"),
            (torch.nn.functional, "linear"),
            (Wrapper, "factor"),
            (scaled, "__defaults__"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setitem(globals(), "STRENGTH", STRENGTH)
        yield


def noticed(decoder: Any, change: Change) -> bool:
    """Return True if a snapshot and a fingerprint notice a change, False if neither does."""
    watch = DecoderSnapshot(decoder)
    assert watch.unchanged()
    assert DecoderSnapshot(decoder).key == watch.key
    change(decoder)
    after = DecoderSnapshot(decoder)
    assert after.unchanged()
    if watch.unchanged():
        assert after.key == watch.key
    differs = after.key != watch.key
    assert bool(watch.key.differences(after.key)) is differs
    return differs


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return wrapper


def replace_method(owner: Any, name: str) -> None:
    """Bind another function that does the same to the object, as kernels of one's own are put in."""
    kind = type(owner)
    setattr(owner, name, types.MethodType(doubled(getattr(kind, name)), owner))


def reverse_layers(decoder: Any) -> None:
    decoder.layers = nn.ModuleList(reversed(decoder.layers))


def same_layer_twice(decoder: Any) -> None:
    decoder.layers[1] = decoder.layers[0]


def rewrite(function: Any, other: Any) -> None:
    function.__code__ = other.__code__


def other_attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.train(),
        lambda d: d.layers[1].double(),
        lambda d: setattr(d.layers[0].self_attn, "scaling", 0.5),
        lambda d: setattr(d.layers[0].self_attn, "note", torch.zeros(2)),
        lambda d: setattr(d.norm, "weight", nn.Parameter(torch.ones(32))),
        lambda d: d.layers[0].register_buffer("extra", torch.ones(1)),
        lambda d: d.layers[0].mlp.add_module("act_fn", nn.ReLU()),
        lambda d: d.layers.append(nn.Linear(1, 1)),
        lambda d: setattr(d.norm, "__class__", nn.LayerNorm),
        reverse_layers,
        same_layer_twice,
        # what functions are bound, on the object, its class, a base class, in its file
        lambda d: replace_method(d.layers[1].mlp, "forward"),
        lambda d: setattr(d.layers[1].mlp, "forward", functools.partial(scaled)),
        lambda d: setattr(type(d.norm), "forward", doubled(type(d.norm).forward)),
        lambda d: setattr(type(d.layers[0].mlp), "forward", lambda self, x: x),
        lambda d: setattr(modeling_llama, "rotate_half", lambda x: x),
        lambda d: setattr(
            modeling_llama, "apply_rotary_pos_emb", doubled(modeling_llama.apply_rotary_pos_emb)
        ),
        lambda d: setattr(torch.nn.functional, "linear", doubled(torch.nn.functional.linear)),
        lambda d: rewrite(modeling_llama.LlamaAttention.forward, other_attention),
        # hooks
        lambda d: d.layers[0].register_forward_hook(lambda *_: None),
        lambda d: d.layers[0].register_forward_hook(lambda *_: None, always_call=True),
        lambda d: d.layers[0].mlp.register_forward_pre_hook(
            lambda *_, **__: None, with_kwargs=True
        ),
        lambda d: d.layers[0].register_full_backward_hook(lambda *_: None),
        lambda d: d.norm.register_full_backward_pre_hook(lambda *_: None),
        lambda d: nn.utils.parametrizations.weight_norm(d.layers[0].mlp.up_proj),
        # the configuration
        lambda d: setattr(d.config, "num_hidden_layers", 1),
        lambda d: d.config.rope_parameters.update(rope_theta=2.0),
        lambda d: setattr(d.config, "head_dim", 4),
    ],
)
def test_decoder_snapshot_notices_every_change(decoder: Any, change: Change) -> None:
    decoder.layers[0].self_attn.note = torch.ones(2)
    assert noticed(decoder, change)
    assert not noticed(decoder, lambda d: None)


def strengthen(_: Any) -> None:
    globals()["STRENGTH"] = 3.0


@pytest.mark.parametrize(
    ("put_in", "change"),
    [
        # wrappers of a forward: closures, defaults, attributes, partial arguments
        ("closure", lambda made: made.update(scale=0.5)),
        ("cell", lambda made: made["set"](0.5)),
        ("default", lambda made: setattr(made["function"], "__kwdefaults__", {"scale": 0.5})),
        ("attribute", lambda made: setattr(made["function"], "scale", 0.5)),
        ("partial", lambda made: made["keywords"].update(scale=0.5)),
        # hooks that are objects, or methods of one
        ("object", lambda made: setattr(made["hook"], "factor", 0.5)),
        ("method", lambda made: setattr(made["hook"], "factor", 0.5)),
        ("object", lambda made: setattr(made["hook"], "apply", scaled)),
        # layers of one's own
        ("layer", lambda made: made["layer"].table["a"].append(3.0)),
        ("layer", lambda made: made["layer"].table["a"].__setitem__(0, 3.0)),
        ("layer", lambda made: setattr(Wrapper, "factor", 3.0)),
        ("layer", strengthen),
        # containers and objects that hold more
        ("list", lambda made: made["list"].append(0.5)),
        ("set", lambda made: made["set"].add(0.5)),
        ("namespace", lambda made: setattr(made["namespace"], "scale", 0.5)),
        ("outer", lambda made: setattr(made["outer"][1], "negative_slope", 0.5)),
    ],
)
def test_decoder_snapshot_follows_code_of_ones_own(
    decoder: Any, put_in: str, change: Change
) -> None:
    made: dict[str, Any] = {"scale": 1.0}
    mlp, inner = decoder.layers[1].mlp, decoder.layers[1].mlp.forward
    if put_in == "closure":
        mlp.forward = lambda x: inner(x) * made["scale"]
    elif put_in == "cell":
        scale = 1.0

        def set_scale(value: float) -> None:
            nonlocal scale
            scale = value

        made["set"] = set_scale
        mlp.forward = lambda x: inner(x) * scale
    elif put_in in ("default", "attribute"):

        def with_default(x: Tensor, *, scale: float = 1.0) -> Any:
            return inner(x) * scale

        with_default.scale = 1.0  # type: ignore[attr-defined]
        made["function"] = mlp.forward = with_default
    elif put_in == "partial":
        mlp.forward = functools.partial(lambda x, scale: inner(x) * scale, scale=1.0)
        made["keywords"] = mlp.forward.keywords
    elif put_in in ("object", "method"):
        made["hook"] = Scale()
        mlp.register_forward_hook(made["hook"] if put_in == "object" else made["hook"].method)
    elif put_in == "layer":
        made["layer"] = decoder.layers[1].mlp = Wrapper(mlp)
    elif put_in == "list":
        made["list"] = mlp.steps = [1.0]
    elif put_in == "set":
        made["set"] = mlp.steps = {1.0}
    elif put_in == "namespace":
        made["namespace"] = options = types.SimpleNamespace(scale=1.0)
        mlp.forward = lambda x: inner(x) * options.scale
    elif put_in == "outer":
        made["outer"] = outer = nn.Sequential(nn.Linear(32, 32), nn.LeakyReLU())
        mlp.forward = lambda x: inner(x) + outer(x)
    del made["scale"]
    if put_in == "closure":
        made["scale"] = 1.0
    assert noticed(decoder, lambda _: change(made))
    assert not noticed(decoder, lambda _: None)


def hook_of(scale: float) -> Callable[..., Any]:
    return lambda module, args, output: output * scale


@pytest.mark.parametrize(
    "change",
    [
        lambda d: setattr(d.config, "use_cache", False),
        lambda d: setattr(d.config, "_attn_implementation", "eager"),
        lambda d: setattr(d.config, "pad_token_id", 3),
        lambda d: d.gradient_checkpointing_enable(),
        lambda d: d.embed_tokens.register_forward_hook(lambda *_: None),
        lambda d: setattr(d.embed_tokens, "forward", d.embed_tokens.forward),
        lambda d: d.layers[0].mlp.up_proj.weight.data.mul_(2),
        lambda d: setattr(
            d.layers[0].self_attn, "scaling", float(str(d.layers[0].self_attn.scaling))
        ),
        lambda d: d.layers[0].register_state_dict_post_hook(lambda *_: None),
    ],
)
def test_decoder_snapshot_ignores_what_no_graph_reads(decoder: Any, change: Change) -> None:
    assert not noticed(decoder, change)


def test_counting_operators_is_no_change(decoder: Any) -> None:
    before = DecoderSnapshot(decoder)
    with FlopCounterMode(display=False):
        assert DecoderSnapshot(decoder).key == before.key


def test_the_same_hook_made_anew_is_the_same(decoder: Any) -> None:
    handle = decoder.layers[0].register_forward_hook(hook_of(2.0))
    before = DecoderSnapshot(decoder)
    handle.remove()
    without = DecoderSnapshot(decoder)
    handle = decoder.layers[0].register_forward_hook(hook_of(2.0))
    assert not before.unchanged()
    assert DecoderSnapshot(decoder).key == before.key != without.key
    handle.remove()
    decoder.layers[0].register_forward_hook(hook_of(3.0))
    assert DecoderSnapshot(decoder).key != before.key


def test_hooks_of_all_modules_count(decoder: Any) -> None:
    watch = DecoderSnapshot(decoder)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not watch.unchanged()
        assert DecoderSnapshot(decoder).key != watch.key
    finally:
        handle.remove()
    assert watch.unchanged()


def test_a_copy_is_another_decoder(decoder: Any) -> None:
    assert DecoderSnapshot(copy.deepcopy(decoder)).key != DecoderSnapshot(decoder).key


def test_a_difference_is_named(decoder: Any) -> None:
    before = DecoderSnapshot(decoder)
    decoder.layers[1].mlp.forward = lambda x: x
    decoder.config.head_dim = 5
    places = before.key.differences(DecoderSnapshot(decoder).key)
    assert described(places) == "config.head_dim and 1 more"


def test_what_is_ignored_is_left_out_with_all_that_is_in_it(decoder: Any) -> None:
    decoder.layers[1].mlp.notes = [1.0]
    before = DecoderSnapshot(decoder)
    decoder.layers[1].mlp.notes.append(2.0)
    places = before.key.differences(DecoderSnapshot(decoder).key)
    watch = DecoderSnapshot(decoder, set(places))
    decoder.layers[1].mlp.notes.append(3.0)
    assert DecoderSnapshot(decoder, set(places)).key == watch.key
