"""Steps that change the model: compiled, restored, adapted, cast, resized, hooked, copied, saved."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import hidrop_fx as hidrop
from hidrop_fx.program.program import PassResult
from tests.runtime.machine import model_changes as changes
from tests.runtime.machine.calls import Calls
from tests.runtime.machine.fresh_models import Change, Recipe, base_of, weights_of
from tests.runtime.machine.machine import IMAGE_TOKENS, LAYERS, Prompt, prompts
from tests.runtime.machine.model_changes import FIRST, SECOND, SWITCHES, Traits
from tests.support.models import BOS, EOS, PAD, schedules
from tests.support.runtimes import graph_runner

SCORES = (
    *("last_token", "last_token", "all_text", "last_token_l2", "all_text_l2"),
    *("previous_layer", "state_change"),
)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
CONFIGURED = frozenset({"other feature layer"})
"""Switches that a saved config keeps."""
NOT_SAVED = frozenset({"hidden states by config"})


WRONG: tuple[dict[str, Any], ...] = (
    {"schedule": "exit=9"},
    {"schedule": "inject:2"},
    {"schedule": "exit=2", "backend": "tensorrt"},
    {"schedule": "exit=2", "attention": "varlen"},
    {"schedule": "exit=2", "passes": "mine"},
    {"schedule": None},
)
"""Arguments that `compile` refuses."""


class ArmedPass:
    """A custom pass that changes nothing, and raises an error while it is armed."""

    __name__ = "armed"
    error: BaseException | None = None

    def __call__(self, program: Any, plan: Any) -> PassResult:
        if ArmedPass.error is not None:
            raise ArmedPass.error
        return PassResult(matched=0)


@st.composite
def compiled_schedules(draw: st.DrawFn) -> hidrop.Schedule:
    given = draw(schedules(LAYERS, image_tokens=IMAGE_TOKENS, scores=SCORES))
    learns = bool(given["prune"]) and draw(st.integers(0, 3)) == 0
    return hidrop.Schedule(
        **given,
        selection="dtopk" if learns else "hard",
    )


compile_options = st.fixed_dictionaries(
    {
        "cuda_graphs": st.booleans(),
        "lowering": st.sampled_from((None, None, "bodies", "whole")),
        "max_graphs": st.sampled_from((1, 3, 64)),
        "bucket_multiple": st.sampled_from((4, 8)),
        "on_new_shape": st.sampled_from(("compile", "compile", "eager")),
        "overlap_vision": st.sampled_from((None, True)),
        "passes": st.sampled_from(((), (), (ArmedPass(),))),
    }
)


class Lifecycle(Calls):
    """Steps that change the model."""

    @initialize(
        backbone=st.sampled_from(["llama", "qwen2", "mistral"]),
        schedule=st.none() | compiled_schedules(),
        options=compile_options,
    )
    def begin(
        self, backbone: str, schedule: hidrop.Schedule | None, options: dict[str, Any]
    ) -> None:
        self.start(backbone)
        if schedule is not None:
            self.compile(schedule, options, False)

    # Schedules.

    @rule(schedule=compiled_schedules(), options=compile_options, inner=st.booleans())
    def compile(self, schedule: hidrop.Schedule, options: dict[str, Any], inner: bool) -> None:
        target = self.base if inner else self.model
        assert hidrop.compile(target, schedule, backend="eager", **options) is target
        self.set_schedule(schedule, options)

    @precondition(lambda self: self.compiled)
    @rule(options=compile_options)
    def compile_alike(self, options: dict[str, Any]) -> None:
        assert self.schedule is not None
        self.compile(self.schedule, options, False)

    @precondition(lambda self: self.compiled)
    @rule()
    def restore(self) -> None:
        assert hidrop.restore(self.model) is self.model
        self.set_schedule(None, {})

    @precondition(lambda self: self.compiled)
    @rule(prompt=prompts, count=st.integers(1, 9))
    def warm_up(self, prompt: Prompt, count: int) -> None:
        inputs = prompt.inputs(self.model)
        shape = hidrop.Shape(batch=2, text=6, images=1, new_tokens=count)

        def call() -> Any:
            return self.model.generate(**inputs, max_new_tokens=count, do_sample=False)

        hidrop.warmup(self.model, [shape, call], progress=False)

    @precondition(lambda self: self.compiled and not self.training)
    @rule(prompt=prompts, compare=st.sampled_from((False, False, True)))
    def look_inside(self, prompt: Prompt, compare: bool) -> None:
        inputs = prompt.inputs(self.model)
        self.call_forward(prompt)
        str(hidrop.inspect(self.model))
        str(hidrop.explain(self.model, **inputs))
        if compare:
            hidrop.compare(self.model, **inputs, new_tokens=1)

    @rule(
        prompt=prompts,
        what=st.sampled_from(("wrong schedules", "other cache", "collect", "release", "move")),
    )
    def aside(self, prompt: Prompt, what: str) -> None:
        """Do what must have no effect."""
        if what == "wrong schedules":
            self.compile_wrongly()
        elif what == "other cache":
            self.a_cache_of_the_other_kind(prompt)
        elif what == "collect":
            gc.collect()
        elif what == "release" and self.graphed:
            graph_runner(self.model).release()
        elif what == "move":
            self.change(partial(changes.move, "cpu"))

    def compile_wrongly(self) -> None:
        for wrong in WRONG:
            with pytest.raises(hidrop.HidropError):
                hidrop.compile(self.model, **wrong)

    # Modes, numbers, sizes.

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.set_mode(training)

    @rule(name=st.sampled_from(sorted(DTYPES)))
    def cast(self, name: str) -> None:
        self.change(partial(changes.cast, DTYPES[name]), dtype=DTYPES[name])

    @precondition(lambda self: not self.backward_failed)
    @rule(more=st.integers(1, 5))
    def resize_embeddings(self, more: int) -> None:
        self.change(partial(changes.grow, more))

    @rule(name=st.sampled_from(sorted(SWITCHES)))
    def switch(self, name: str) -> None:
        on, off = SWITCHES[name]
        marks = self.traits.marks
        self.change(off if name in marks else on, marks=marks ^ {name})

    # Adapters.

    @precondition(lambda self: not self.traits.adapters)
    @rule()
    def attach(self) -> None:
        self.change(changes.attach, adapters=(FIRST,), active=FIRST)

    @precondition(lambda self: self.traits.adapters)
    @rule(what=st.integers(0, 11))
    def adapt(self, what: int) -> None:
        """Make one of the changes that the adapters allow as they are."""
        possible = list(self.possible())
        change, traits = possible[what % len(possible)]
        self.change(change, **traits)

    def possible(self) -> Iterator[tuple[Change, dict[str, Any]]]:
        now = self.traits
        yield partial(changes.scale_lora, 2.0), {}
        yield partial(changes.scale_lora, 0.5), {}
        if not now.disabled:
            yield changes.unmerge if now.merged else changes.merge, {"merged": not now.merged}
        if now.merged:
            return
        yield changes.enable if now.disabled else changes.disable, {"disabled": not now.disabled}
        gone: dict[str, Any] = {"adapters": (), "active": None, "disabled": False}
        yield changes.unload, gone
        if not now.disabled:
            yield changes.merge_and_unload, gone
        if now.adapters == (FIRST,):
            yield changes.add_second, {"adapters": (FIRST, SECOND)}
        else:
            other = FIRST if now.active == SECOND else SECOND
            yield partial(changes.activate, other), {"active": other}
        if SECOND in now.adapters and now.active == FIRST:
            yield changes.remove_second, {"adapters": (FIRST,)}

    @precondition(lambda self: self.traits.adapters and not self.traits.merged)
    @rule(prompt=prompts)
    def call_without_adapter(self, prompt: Prompt) -> None:
        """Call within `disable_adapter`; what was remembered of the prompt does not hold there."""
        if self.traits.disabled:
            return
        with self.model.disable_adapter():
            self.recipe.changes.append(changes.disable)
            self.note_change()
            self.call_forward(prompt)
        self.recipe.changes.pop()
        self.note_change()

    # Copies.

    @rule(prompt=prompts, how=st.sampled_from(("deepcopy", "pickle")), stay=st.booleans())
    def copy(self, prompt: Prompt, how: str, stay: bool) -> None:
        if how == "pickle" and "other forward of an MLP" in self.traits.marks:
            how = "deepcopy"  # pickle looks a method up by its name
        original = self.model
        twin = None if how == "deepcopy" else _pickled(original)
        if twin is None:
            twin = copy.deepcopy(original)
        assert hidrop.is_compiled(twin) == self.compiled
        self.model = twin
        kept, self.kept = self.kept, []
        self.call_forward(prompt)
        if stay:
            self.model, self.kept = original, kept
            self.call_forward(prompt)
        else:
            self.adopt(twin)

    @precondition(lambda self: not self.traits.adapters and not self.traits.marks & NOT_SAVED)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.base.save_pretrained(directory)
            loaded = type(self.base).from_pretrained(directory, dtype=self.traits.dtype)
            if self.compiled:
                options = {k: v for k, v in self.options.items() if k != "passes"}
                hidrop.load(loaded, directory, backend="eager", **options)
                self.options = options
        generation = loaded.generation_config
        assert (generation.pad_token_id, generation.eos_token_id) == (PAD, EOS)
        assert generation.bos_token_id == BOS
        config = copy.deepcopy(base_of(self.model).config)
        self.recipe = Recipe(config, [partial(_cast_parameters, self.traits.dtype)])
        self.traits = Traits(dtype=self.traits.dtype, marks=self.traits.marks & CONFIGURED)
        self.training = False
        self.adopt(loaded)
        self.weights = weights_of(loaded)

    @precondition(lambda self: self.compiled)
    @rule(back=st.booleans())
    def save_and_load_schedule(self, back: bool) -> None:
        """Save and load schedule and ratios, beside a model that stays."""
        schedule, ratios, options = self.schedule, self.ratios, self.options
        with tempfile.TemporaryDirectory() as directory:
            hidrop.save(self.model, directory)
            if back:
                hidrop.restore(self.model)
                hidrop.load(self.model, directory, backend="eager", **options)
            else:
                hidrop.load(self.model, directory)
        self.note_change(structure=back)
        self.schedule, self.ratios = schedule, ratios


def _pickled(model: Any) -> Any:
    """Return a model after a round trip; None where hooks of transformers' own do not pickle."""
    try:
        return pickle.loads(pickle.dumps(model))
    except AttributeError as error:
        if any(
            name in str(error) for name in ("output_capturing_hook", "make_inputs_require_grads")
        ):
            return None
        raise


def _cast_parameters(dtype: torch.dtype, model: Any) -> Any:
    """Cast parameters alone, as `from_pretrained`, which leaves the frequencies of RoPE in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
