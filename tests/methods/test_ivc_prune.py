"""IVC-Prune, held against the rule of its Llama file (facts in part B, section 1), one token at a time.

Values of layer k - 1 behind its norm, per KV head, a softmax over all columns; the question begins two columns behind the image;
rounded as Python rounds; layer 0 keeps its cache, layers 1 to k - 1 lose what layer k drops. Several images count as one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import Schedule, ScheduleError
from hidrop_fx.runtime.kv.token_log import INVALID
from tests.support.gradients import assert_gradients_close
from tests.support.models import IMAGE, IMAGE_TOKEN, batch, tiny_llava
from tests.support.reference import Cut, Reference, RowResult, split_batch
from tests.support.runtimes import compiled_eagerly, runtime_in

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

LAYERS, TOKENS, LAYER = 5, 25, 3
ROWS: Any = [
    [5, 6, IMAGE, 7, 8, 9, 10, 11],
    [8, 9, IMAGE, 4, IMAGE, 3, 3, 12, 5],
    [11, 12],
    [5, IMAGE, 7, 13],
]


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS)


class IvcReference(Reference):
    def __init__(self, model: Any, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.score = "last_token"

    def prefill(self, *args: Any, **kwargs: Any) -> RowResult:
        found = super().prefill(*args, **kwargs)
        for k in range(1, LAYER):
            cache = found.caches[k]
            stays = [j for j, column in enumerate(cache.columns) if column in found.columns[LAYER]]
            cache.keys, cache.values = cache.keys[stays], cache.values[stays]
            cache.columns = [cache.columns[j] for j in stays]
            cache.ids = [cache.ids[j] for j in stays]
        return found

    def _cut(
        self,
        layer: Any,
        hidden: Any,
        columns: Any,
        ids: Any,
        alive: Any,
        queries: Any,
        count: Any,
        last: Any,
        past: Any = None,
    ) -> Cut:
        before, states, layer_ids = last
        module = before.self_attn
        values = module.v_proj(before.input_layernorm(states)).view(
            len(columns), -1, module.head_dim
        )
        n, heads = len(alive), values.shape[1]

        def row(i: int) -> list[float]:
            found = [0.0] * len(columns)
            for g in range(heads):
                logits = values[:, g].double() @ values[i, g].double() / math.sqrt(module.head_dim)
                for j, weight in enumerate(logits.softmax(0).tolist()):
                    found[j] += weight / heads
            return found

        def best(scores: list[float], wanted: int) -> set[int]:
            return set(sorted(alive, key=lambda c: (-scores[columns.index(c)], c))[:wanted])

        question = [c for c in columns if c >= max(alive) + 3] or [columns[-1]]
        rows = [row(columns.index(c)) for c in question]
        mean = [sum(values) for values in zip(*rows, strict=True)]
        seeds = best(mean, max(1, round(0.01 * n)))
        rows += [row(columns.index(c)) for c in seeds]
        kept = seeds | best([sum(values) for values in zip(*rows, strict=True)], round(0.2 * n))
        cos, sin = self.decoder.rotary_emb(hidden, torch.tensor([layer_ids]))
        for table in (cos, sin):
            kept |= best(table[0].mean(dim=-1).tolist(), round(0.05 * n))
        return Cut(list(alive), torch.zeros(n), sorted(kept), math.inf)


def assert_generates(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], count: int = 4
) -> None:
    options = dict(
        do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    found = model.generate(**inputs, max_new_tokens=count, **options)
    cache, width = found.past_key_values, inputs["input_ids"].shape[1]
    logits = torch.stack(found.logits, dim=1)
    for b, row in enumerate(split_batch(model, inputs)):
        reference = IvcReference(model, schedule)
        with torch.no_grad():
            prompt = reference.prefill(row.input_ids, row.features)
            lengths = prompt.kv_lengths
            expected = [prompt.logits[-1]]
            said = [int(expected[-1].argmax())]
            while len(said) < count:
                column = prompt.length + len(said) - 1
                expected.append(reference._decode(said[-1], column, prompt.caches))
                said.append(int(expected[-1].argmax()))
        assert found.sequences[b, -count:].tolist() == said
        torch.testing.assert_close(logits[b], torch.stack(expected), atol=1e-4, rtol=1e-4)
        for k, layer in enumerate(cache.layers):
            held = cache.log.columns[layer.segment][b, : 1 - count].tolist()
            columns = [c for c in held if c < width]
            behind = prompt.columns[0] if k == 0 else prompt.columns[LAYER]
            assert columns == row.places[behind].tolist()
            assert len(columns) == lengths[k]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_is_kept_and_generated_is_the_authors(padding: Any, llava: Any) -> None:
    schedule = Schedule.preset("ivc-prune", layer=LAYER)
    with compiled_eagerly(llava, schedule):
        assert_generates(llava, schedule, batch(llava, ROWS, padding=padding))
        assert hidrop.compare(llava, **batch(llava, ROWS, padding=padding), new_tokens=2).ok
        layout = runtime_in(llava).last_layout
        assert layout is not None
        # At most so many: 1 + 5 + 2 of 25; 1 + 10 + 2 * 2 of 50, whose halves round to even.
        assert layout.vision_counts["prune_3"] == [8, 15, 0, 8]


def test_a_smaller_keep_takes_the_best_of_what_the_rule_chose(llava: Any) -> None:
    inputs = batch(llava, ROWS)
    kept = []
    for text in ("prune=3:1.0,score=value_similarity", "prune=3:4,score=value_similarity"):
        with compiled_eagerly(llava, text):
            cache = llava(**inputs, use_cache=True).past_key_values
            assert hidrop.compare(llava, **inputs).ok
        kept.append([{*row} for row in cache.log.prompt_columns["prune_3"].tolist()])
    images = [1, 2, 0, 1]
    for b, (chosen, fewer) in enumerate(zip(*kept, strict=True)):
        assert fewer <= chosen
        words = int((inputs["attention_mask"][b] * (inputs["input_ids"][b] != IMAGE_TOKEN)).sum())
        assert len(fewer - {INVALID}) == words + 4 * images[b]


def test_fields_and_costs() -> None:
    schedule = Schedule.preset("ivc-prune")
    assert schedule == Schedule.parse(
        "prune=16:1.0,score=value_similarity,cache=retroactive(layer=16,first=1)"
    )
    costs = hidrop.plan(
        schedule,
        num_layers=32,
        hidden_size=64,
        intermediate_size=128,
        vision_tokens=576,
        text_tokens=64,
    )
    assert costs.vision_tokens[15:17] == (576, 179)
    assert [costs.cached_tokens[k] for k in (0, 1, 15, 16, 31)] == [640, 243, 243, 243, 243]
    assert Schedule.preset("ivc-prune", layer=1).cache is None


def test_caches_may_follow_any_prune(llava: Any) -> None:
    text = "inject=1,prune=3:4,exit=4,cache=retroactive(layer=3,first=2)"
    inputs = batch(llava, ROWS)
    with compiled_eagerly(llava, text):
        cache = llava(**inputs, use_cache=True).past_key_values
        whole, words = TOKENS * 2 + 7, 7
        assert [layer.filled for layer in cache.layers] == [
            words,
            whole,
            words + 8,
            words + 8,
            words,
        ]
        assert hidrop.compare(llava, **inputs, new_tokens=2).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prune=3:4,cache=retroactive(layer=2)",
            r"nothing is pruned at layer 2; name one of the filter layers \[3\]",
        ),
        ("prune=3:4,cache=retroactive(layer=3,first=3)", "first=3 is not before layer=3"),
        ("inject=2,prune=3:4,cache=retroactive(layer=3)", "holds no vision token.*use first=2"),
        ("prune=3:4,cache=retroactive(layer=None)", "layer=None is no layer"),
        (
            "prune=3:1.0,score=value_similarity,positions=compact",
            "decides by itself how many tokens stay",
        ),
        ("ivc-prune(layer=0)", "'previous_value' of the layer before prune layer 0"),
        ("ivc-prune(layer=40)", "prune layer 40 but the model has 5 layers"),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text, LAYERS)


def test_gradients_go_through_what_was_kept(llava: Any) -> None:
    inputs = batch(llava, ROWS[:1])
    (row,) = split_batch(llava, inputs)
    schedule = Schedule.preset("ivc-prune", layer=LAYER)
    names = [n for n, _ in llava.named_parameters() if "language_model" in n or "lm_head" in n]

    def of(logits: Tensor) -> dict[str, Tensor]:
        parameters = [llava.get_parameter(name) for name in names]
        grads = torch.autograd.grad(logits.square().sum(), parameters)
        return dict(zip(names, grads, strict=True))

    reference = IvcReference(llava, schedule)
    prompt = reference.prefill(row.input_ids, row.features)
    wanted = of(reference._decode(17, prompt.length, prompt.caches))
    with compiled_eagerly(llava, schedule):
        cache = llava(**inputs, use_cache=True).past_key_values
        found = of(llava(input_ids=torch.tensor([[17]]), past_key_values=cache).logits[0, -1])
    assert_gradients_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "graphs"), [("eager", True), ("aot_eager", True), ("inductor", False)]
)
def test_compilers_and_recordings_answer_the_same(backend: str, graphs: bool, llava: Any) -> None:
    schedule = Schedule.preset("ivc-prune", layer=LAYER)
    hidrop.compile(llava, schedule, backend=backend, cuda_graphs=graphs)
    try:
        for rows in (ROWS, ROWS[:2], ROWS[::-1]):
            assert_generates(llava, schedule, batch(llava, rows))
        assert not runtime_in(llava).programs.log.fallbacks
    finally:
        hidrop.restore(llava)


def test_without_its_prune_caches_follow_nothing(llava: Any, tmp_path: Path) -> None:
    """As a page of reports compares each event with the schedule without it."""
    schedule = Schedule.preset("ivc-prune", layer=LAYER)
    assert schedule.with_keeps({}) == Schedule(score="value_similarity")
    assert Schedule(prune={2: 4}, merge="nearest_key").with_keeps({}) == Schedule()
    assert schedule.with_keeps({LAYER: 0.5}).cache == schedule.cache
    with compiled_eagerly(llava, schedule):
        llava.generate(**batch(llava, ROWS[:1]), max_new_tokens=2, do_sample=False)
        hidrop.dump(llava, tmp_path / "dump")
        assert hidrop.replay(tmp_path / "dump", llava, **batch(llava, ROWS[:1])).ok
