"""The stage on the cache, held against its authors' rules, one head and one token at a time.

What MixKV's released code computes is in its classes SnapKVCluster (also with a pyramid): mean over the window's queries, then
over the query heads of a KV head, then pooling over the tokens before the window; the rest as the functions here say. One
thing differs on purpose: the redundancy of a head is that of the prompt, which the code computes and throws away.

Over 400 lines: one reference, written out, and everything that is held against it.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import Schedule, ScheduleError
from hidrop_fx.methods import register_cache_cut
from tests.methods.test_reducers import shortened
from tests.support.generation import new_tokens
from tests.support.gradients import assert_gradients_close
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.reference import LayerCache, Reference, RowResult, split_batch, window_of
from tests.support.runtimes import compiled_eagerly, runtime_in

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12], [5, IMAGE, 7]]
LAYERS, TOKENS = 4, 9
CUTS = [
    "snapkv(window=3,capacity=8)",
    "snapkv(window=2,capacity=5,kernel=3,pooling='max',heads='max')",
    "pyramidkv(window=2,capacity=8,beta=3)",
    "pyramidkv(window=3,capacity=9,variant='headwisemixkv')",
    "mixkv(window=3,capacity=8)",
    "mixkv(window=1,capacity=7,variant='mixkv',kernel=1)",
    "mixkv(window=4,capacity=40)",
]
each_cut = pytest.mark.parametrize("cut", CUTS)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS)


# The rules, written out.


def attention_of_window(
    queries: Tensor, cache: LayerCache, window: int, module: Any, *, best: bool
) -> list[list[float]]:
    """For each KV head, what the last `window` tokens pay each token before them."""
    keys, scale, sliding = cache.keys.detach(), module.scaling, window_of(module) or 1 << 20
    length, group = len(keys), queries.shape[1] // keys.shape[1]
    found = []
    for g in range(keys.shape[1]):
        heads = []
        for h in range(g * group, (g + 1) * group):
            rows = []
            for i in range(length - window, length):
                near = [cache.columns[i] - c < sliding for c in cache.columns]
                first = near.index(True)
                logits = [float(queries[i, h] @ keys[j, g]) * scale for j in range(first, i + 1)]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                row = [0.0] * first + [w / sum(weights) for w in weights]
                rows.append(row + [0.0] * (length - len(row)))
            heads.append([sum(row[j] for row in rows) / window for j in range(length - window)])
        join = max if best else lambda values: sum(values) / len(values)
        found.append([join([head[j] for head in heads]) for j in range(length - window)])
    return found


def pool(scores: list[float], kernel: int, best: bool) -> list[float]:
    reach = kernel // 2
    near = [scores[max(0, j - reach) : j + reach + 1] for j in range(len(scores))]
    return [max(part) if best else sum(part) / kernel for part in near]


def scaled(scores: list[float], level: float, epsilon: float) -> list[float]:
    low, high = min(scores), max(scores)
    unit = [(x - low) / (high - low + epsilon) for x in scores]
    return [x * level / (sum(unit) / len(unit) + 1e-8) for x in unit]


def mixed(attention: list[float], keys: Tensor, values: Tensor, variant: str) -> list[float]:
    """`keys` and `values` [S, d] of one head; the scores are of the tokens before the window."""
    count, level = len(attention), sum(attention) / len(attention)
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    mean = unit.mean(dim=0)
    diversity = scaled([-float(unit[j] @ mean) for j in range(count)], level, 1e-8)
    norms = scaled([float(values[j].double().norm()) for j in range(count)], level, 0.0)
    together = list(zip(attention, diversity, norms, strict=True))
    if variant == "mixkv":
        return [0.33 * d + 0.33 * a + 0.33 * n for a, d, n in together]
    pairs = [float(unit[i] @ unit[j]) for i in range(len(keys)) for j in range(len(keys)) if i != j]
    r = sum(pairs) / len(pairs)
    return [r * d + (1 - r) * (a + n) for a, d, n in together]


def capacity_of(name: str, given: dict[str, Any], length: int, layer: int, layers: int) -> int:
    """`pyramid_capacity`, with each prompt's own length."""
    if name != "pyramidkv":
        return int(given["capacity"])
    base = given["capacity"] - given["window"]
    low = base // given["beta"]
    high = base * 2 - low
    if high >= length - given["window"]:
        high = length - given["window"]
        low = base * 2 - high
    return int(high - layer * ((high - low) // (layers - 1)) + given["window"])


class CutReference(Reference):
    """Greedy decoding of one row over caches that are cut behind the prompt."""

    def __init__(self, model: Any, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        assert schedule.cut is not None
        self.name, self.given = schedule.cut.rule.name, dict(schedule.cut.arguments)
        self.queries: list[Tensor] = []
        self.held: list[list[list[int]]] = []
        """As `kept`, with the tokens since."""
        self.kept: list[list[list[int]]] = []
        """By layer and KV head, the columns."""

    def prefill(self, *args: Any, **kwargs: Any) -> RowResult:
        self.queries = []
        found = super().prefill(*args, **kwargs)
        self.kept = [self._cut_layer(k, cache) for k, cache in enumerate(found.caches)]
        self.held = [[list(head) for head in layer] for layer in self.kept]
        return found

    def _layer(
        self, layer: Any, hidden: Tensor, columns: Any, ids: Any, past: Any, *rest: Any
    ) -> Any:
        normed = layer.input_layernorm(hidden)
        queries, keys, values = self._project(layer.self_attn, normed, ids)
        if not past.columns:
            self.queries.append(queries)
            return super()._layer(layer, hidden, columns, ids, past, *rest)
        # One new token, each KV head over what it holds.
        module, k = layer.self_attn, list(self.decoder.layers).index(layer)
        past.keys, past.values = torch.cat([past.keys, keys]), torch.cat([past.values, values])
        past.ids = past.ids + ids
        past.columns = past.columns + columns
        group, sliding = queries.shape[1] // keys.shape[1], window_of(module)
        mixed_heads = []
        for h in range(queries.shape[1]):
            held = self.held[k][h // group]
            if h % group == 0:
                held.append(columns[0])
            logits = past.keys[:, h // group] @ queries[0, h] * module.scaling
            for j, column in enumerate(held):
                if sliding is not None and column <= columns[0] - sliding:
                    logits[j] = -math.inf
            mixed_heads.append(logits.softmax(-1) @ past.values[:, h // group])
        hidden = hidden + module.o_proj(torch.cat(mixed_heads)[None])
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), past

    def _cut_layer(self, k: int, cache: LayerCache) -> list[list[int]]:
        given, length = self.given, len(cache.columns)
        heads = range(cache.keys.shape[1])
        keys, values = cache.keys.detach(), cache.values.detach()
        capacity = capacity_of(self.name, given, length, k, len(self.decoder.layers))
        if length <= max(capacity, given["window"]):
            return [list(cache.columns) for _ in heads]
        module = self.decoder.layers[k].self_attn
        attention = attention_of_window(
            self.queries[k].detach(), cache, given["window"], module, best=given["heads"] == "max"
        )
        places = []
        for g in heads:
            scores = pool(attention[g], given["kernel"], given["pooling"] == "max")
            if given.get("variant", "attn") != "attn":
                scores = mixed(scores, keys[:, g], values[:, g], given["variant"])
            order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
            last = range(length - given["window"], length)
            places.append(sorted([*order[: capacity - given["window"]], *last]))
        index = torch.tensor(places).T  # [n, heads]
        columns = cache.columns
        cache.keys = cache.keys.gather(0, index[..., None].expand(-1, -1, cache.keys.shape[2]))
        cache.values = cache.values.gather(
            0, index[..., None].expand(-1, -1, cache.values.shape[2])
        )
        cache.columns = [columns[j] for j in places[0]]
        cache.ids = [cache.ids[j] for j in places[0]]
        return [[columns[j] for j in own] for own in places]


def expected(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], count: int
) -> list[tuple[list[int], Tensor, list[list[list[int]]], list[int]]]:
    """New tokens, their logits, kept columns of the padded row, and lengths by layer, of each row."""
    found = []
    for row in split_batch(model, inputs):
        reference = CutReference(model, schedule)
        with torch.no_grad():
            prompt = reference.prefill(row.input_ids, row.features)
            logits = [prompt.logits[-1]]
            tokens = [int(logits[-1].argmax())]
            lengths = prompt.kv_lengths
            while len(tokens) < count:
                column = prompt.length + len(tokens) - 1
                logits.append(reference._decode(tokens[-1], column, prompt.caches))
                tokens.append(int(logits[-1].argmax()))
        kept = [[row.places[own].tolist() for own in layer] for layer in reference.kept]
        found.append((tokens, torch.stack(logits), kept, lengths))
    return found


def assert_generates(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], count: int = 4
) -> None:
    wanted = expected(model, schedule, inputs, count)
    options = dict(
        do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    found = model.generate(**inputs, max_new_tokens=count, **options)
    cache = found.past_key_values
    assert found.sequences[:, -count:].tolist() == [tokens for tokens, *_ in wanted]
    logits = torch.stack(found.logits, dim=1)
    torch.testing.assert_close(logits, torch.stack([w[1] for w in wanted]), atol=1e-4, rtol=1e-4)
    width = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == width + count - 1
    for k, layer in enumerate(cache.layers):
        columns = cache.log.columns[layer.segment][..., : 1 - count]
        for b, (_, _, kept, lengths) in enumerate(wanted):
            own = [[c for c in head if c < width] for head in columns[b].tolist()]
            assert own == kept[k]
            assert len(own[0]) == lengths[k]
        held = max(w[3][k] for w in wanted)
        assert cache.get_seq_length(k) == max(2, held) + count - 1


@each_cut
@pytest.mark.parametrize("padding", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_what_is_kept_and_generated_is_the_authors(cut: str, padding: Any, llava: Any) -> None:
    schedule = Schedule(cache=cut)
    with compiled_eagerly(llava, schedule):
        assert_generates(llava, schedule, batch(llava, ROWS, padding=padding))
        assert_generates(llava, schedule, batch(llava, ROWS[:1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv(window=32,capacity=16)", "window=32 leaves none of capacity=16 to choose; use a"),
        ("snapkv(window=8,capacity=8)", "window=8 leaves none of capacity=8"),
        ("snapkv(window=0)", "window=0 is not a number of tokens; use an int >= 1"),
        ("mixkv(capacity=0.5)", "capacity=0.5 is not a number of tokens"),
        ("mixkv(variant='knorm')", "variant='knorm'; use one of 'attn', 'mixkv', 'headwisemixkv'"),
        ("pyramidkv(beta=0)", "beta=0 is not"),
        ("pyramidkv(kernel=4)", "kernel=4 has no middle; use an odd number"),
        ("snapkv(variant='attn')", "snapkv takes window, capacity, .*, not variant"),
        ("h2o(capacity=8)", "unknown cache='h2o': choose one of snapkv"),
        ("snapkv(8)", "cannot read '8'"),
    ],
)
def test_bad_arguments_are_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(cache=text)


def test_a_cut_is_a_field_in_every_form() -> None:
    schedule = Schedule.parse("inject=1,prune=2:4,exit=3,cache=snapkv(capacity=64)")
    assert schedule.cache == "snapkv(window=32,capacity=64,kernel=5,pooling='avg',heads='mean')"
    assert Schedule.parse(str(schedule)) == Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.preset("snapkv", capacity=64) == Schedule(cache="snapkv(capacity=64)")
    assert not Schedule(cache="mixkv").identity
    assert Schedule(cache="mixkv").whole_prefill
    with pytest.raises(ScheduleError, match=r"beside reads=.*leave one of the two out"):
        Schedule(cache="mixkv", reads=(0, 1))
    with pytest.raises(ScheduleError, match="cache=64 is no str"):
        Schedule(cache=64)  # type: ignore[arg-type]


def test_a_cut_of_ones_own(llava: Any) -> None:
    def half(tokens: int, *, window: int) -> int:
        return tokens // 2

    @register_cache_cut("key_norm_half", capacity=half)
    def key_norm(key: Tensor, *, window: int = 2) -> Tensor:
        return -key.float().norm(dim=-1)

    inputs = batch(llava, ROWS, padding="right")  # where positions count from the first token
    with pytest.raises(ScheduleError, match="asks for weights, which nothing provides"):
        register_cache_cut("bad", capacity=half)(lambda weights: weights)
    with compiled_eagerly(llava, "cache=key_norm_half(window=3)"):
        cache = llava(**inputs, use_cache=True).past_key_values
        hidrop.inspect(llava)
    for b, row in enumerate(split_batch(llava, inputs)):
        with torch.no_grad():
            caches = Reference(llava, Schedule()).prefill(row.input_ids, row.features).caches
        count = len(row.input_ids)
        for k, layer in enumerate(cache.layers):
            for g in range(2):
                norms = caches[k].keys[:, g].norm(dim=-1)
                best = norms[:-3].argsort(stable=True)[: max(0, count // 2 - 3)].tolist()
                last = range(count - 3, count) if count > 2 else range(count)
                wanted = row.places[sorted([*best, *last])].tolist()
                columns = cache.log.columns[layer.segment][b, g].tolist()
                assert columns[: len(wanted)] == wanted
                torch.testing.assert_close(
                    layer.keys[b, g, : len(wanted)], caches[k].keys[sorted([*best, *last]), g]
                )


def test_reports_count_what_caches_hold(llava: Any) -> None:
    inputs = batch(llava, ROWS[:2])
    schedule = Schedule(prune={2: 2}, exit=3, cache="snapkv(window=3,capacity=9)")
    whole = len(split_batch(llava, inputs)[0].input_ids)
    costs = hidrop.plan(schedule, llava, text_tokens=whole - TOKENS)
    assert costs.cached_tokens == (9, 9, 6, 4)
    assert costs.tokens == (13, 13, 6, 4)
    assert costs.layer_kv_bytes[0] == 2 * 2 * 8 * 4 * 9
    with compiled_eagerly(llava, schedule):
        told = hidrop.explain(llava, **inputs)
        assert told.caches == (("0-2", 9), ("3", 5))
        assert "caches of 9 (layers 0-2), 5" in str(told)
        cache = llava(**inputs, use_cache=True).past_key_values
        report = hidrop.inspect(llava)
        assert [layer.kv_length for layer in report.layers] == [9, 9, 9, 5]
        assert [layer.filled for layer in cache.layers] == [9, 9, 9, 5]
        assert report.cache_bytes == cache.nbytes


SLOW = pytest.mark.slow
COMPOSED = [
    ("llama", "inject=1,prune=1:5+2:2,exit=3,cache=snapkv(window=2,capacity=8)"),
    ("qwen3", "prune=2:0.5,positions=compact,cache=mixkv(window=2,capacity=9)"),
    pytest.param(
        "qwen2",
        "inject=2,exit=3,positions=group,cache=pyramidkv(window=3,capacity=9,beta=2)",
        marks=SLOW,
    ),
    pytest.param(
        "llama",
        "prune=1:3,score=previous_layer,cache=mixkv(window=2,capacity=7,variant='mixkv')",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("backbone", "text"), COMPOSED)
def test_a_cut_lies_behind_every_other_stage(backbone: str, text: str) -> None:
    model = tiny_llava(backbone, num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS)
    with compiled_eagerly(model, text):
        assert_generates(model, Schedule.parse(text), batch(model, ROWS), count=6)
        report = hidrop.compare(model, **batch(model, ROWS), new_tokens=3)
        assert report.ok, str(report)


@pytest.mark.parametrize("backbone", [pytest.param("mistral", marks=SLOW), "qwen2"])
@pytest.mark.parametrize(
    "cut", [pytest.param("snapkv(window=3,capacity=8)", marks=SLOW), "mixkv(window=2,capacity=9)"]
)
def test_a_cut_of_layers_with_a_window_of_their_own(backbone: str, cut: str) -> None:
    """Scores are of what the layer sees; behind the prompt each head's tokens leave the window by their own columns."""
    model = tiny_llava(
        backbone, num_layers=LAYERS, kv_heads=2, image_tokens=TOKENS, sliding_window=7
    )
    with compiled_eagerly(model, Schedule(cache=cut)):
        assert_generates(model, Schedule(cache=cut), batch(model, ROWS), count=6)
        assert hidrop.compare(model, **batch(model, ROWS), new_tokens=2).ok


def test_behind_a_merge_before_the_decoder() -> None:
    llava = tiny_llava("llama", num_layers=LAYERS, kv_heads=2, image_tokens=16)
    text = "before=visionzip(dominant=4,contextual=3),positions=compact,cache=mixkv(window=2,capacity=8)"
    inputs, schedule = batch(llava, ROWS), Schedule.parse(text)
    wanted = []
    for ids, features, _, _ in shortened(llava, schedule, inputs):
        reference = CutReference(llava, Schedule(cache=schedule.cache))
        wanted.append(reference.generate(ids, features, 4))
    with compiled_eagerly(llava, schedule):
        assert new_tokens(llava, inputs, 4) == wanted


CUT = Schedule(cache="mixkv(window=3,capacity=8)")


def traced(model: Any, row: Any, tokens: list[int]) -> list[Tensor]:
    """Logits behind the prompt and behind each of the tokens that follow it."""
    reference = CutReference(model, CUT)
    prompt = reference.prefill(row.input_ids, row.features)
    logits = [prompt.logits[-1]]
    for step, token in enumerate(tokens):
        logits.append(reference._decode(token, prompt.length + step, prompt.caches))
    return logits


def test_a_later_turn_goes_on_with_what_was_kept(llava: Any) -> None:
    """Its tokens are added, several at once, and nothing is cut again; a copy and a pickle go on as well."""
    inputs = batch(llava, ROWS[:1])
    (row,) = split_batch(llava, inputs)
    with compiled_eagerly(llava, CUT), torch.no_grad():
        first = llava.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        said = first.sequences[0, -3:].tolist()
        words = [17, 4, 21]
        wanted = traced(llava, row, [*said, *words])
        cache = first.past_key_values
        assert cache.get_seq_length() == len(row.input_ids) + 2
        for own in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
            found = llava(input_ids=torch.tensor([[said[-1], *words]]), past_key_values=own).logits
            torch.testing.assert_close(found[0], torch.stack(wanted[3:]), atol=1e-4, rtol=1e-4)
        cache.crop(-2)
        again = llava(input_ids=torch.tensor([words[1:]]), past_key_values=cache).logits
        torch.testing.assert_close(again[0], torch.stack(wanted[5:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("graphs", [False, True])
def test_beams_take_their_caches_with_them(graphs: bool, llava: Any) -> None:
    inputs = batch(llava, ROWS)
    hidrop.compile(llava, CUT, backend="eager", cuda_graphs=graphs)
    try:
        found = llava.generate(
            **inputs,
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
    finally:
        hidrop.restore(llava)
    for b, row in enumerate(split_batch(llava, inputs)):
        for i in (2 * b, 2 * b + 1):
            said = found.sequences[i, -4:].tolist()
            with torch.no_grad():
                logits = traced(llava, row, said[:-1])
            chances = [
                float(each.log_softmax(-1)[token]) for each, token in zip(logits, said, strict=True)
            ]
            assert float(found.sequences_scores[i]) == pytest.approx(sum(chances) / 4, abs=1e-4)


@pytest.mark.parametrize("cut", [*CUTS[2:4], *(pytest.param(c, marks=SLOW) for c in CUTS[4:])])
def test_recorded_calls_answer_the_same(cut: str, llava: Any) -> None:
    """Lengths are rounded for recordings; other prompts, and longer ones, are served by the same memory."""
    batches = [
        batch(llava, ROWS),
        batch(llava, ROWS[:2], padding="right"),
        batch(llava, ROWS[::-1]),
    ]
    answers = []
    for graphs in (False, True):
        hidrop.compile(llava, Schedule(cache=cut), backend="eager", cuda_graphs=graphs)
        try:
            answers.append([new_tokens(llava, given, 4) for given in (*batches, *batches)])
        finally:
            hidrop.restore(llava)
    assert answers[0] == answers[1]


def test_gradients_go_through_what_was_kept(llava: Any) -> None:
    inputs = batch(llava, ROWS[:1])
    (row,) = split_batch(llava, inputs)
    names = [n for n, p in llava.named_parameters() if "language_model" in n or "lm_head" in n]

    def of(loss: Tensor) -> list[Tensor]:
        parameters = [llava.get_parameter(name) for name in names]
        return list(torch.autograd.grad(loss, parameters))

    wanted = of(traced(llava, row, [17])[-1].square().sum())
    with compiled_eagerly(llava, CUT):
        cache = llava(**inputs, use_cache=True).past_key_values
        logits = llava(input_ids=torch.tensor([[17]]), past_key_values=cache).logits
        found = of(logits[0, -1].square().sum())
    assert_gradients_close(
        dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True))
    )


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "graphs"), [("aot_eager", True), ("inductor", False)])
@pytest.mark.parametrize("cut", CUTS[2:5])
def test_compilers_answer_the_same(cut: str, backend: str, graphs: bool, llava: Any) -> None:
    batches = [batch(llava, ROWS), batch(llava, ROWS[:2]), batch(llava, ROWS[3:])]
    answers = []
    for options in ({"backend": "eager"}, {"backend": backend, "cuda_graphs": graphs}):
        hidrop.compile(llava, Schedule(cache=cut), **options)
        try:
            answers.append([new_tokens(llava, given, 4) for given in batches])
            assert not runtime_in(llava).programs.log.fallbacks
        finally:
            hidrop.restore(llava)
    assert answers[0] == answers[1]
