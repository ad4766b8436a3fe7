"""A side branch that scores one prune, held against TwigVLM's rule, written out.

The rule is that of TwigVLM's code (its generators with token pruning): a branch of T layers runs on all tokens of layer K's
input; the last row of its last layer's attention, head mean, ranks the image's tokens; `ceil((L R - K N) / (exit - K))` of N
stay, at their places; all leave before layer `exit`. What the branch attends to is kept in no cache.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import last_layout
from tests.support.twig import TwigVLM, a_twig, rows_of

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

ROWS: Any = [[5, 6, IMAGE, 7, 8], [8, 9, IMAGE, 4, 3, 3, 11, 12], [11, 12], [IMAGE, 4, 9]]
LAYERS, TOKENS = 5, 9
SMALL = {"layer": 1, "average": 4, "exit": 4}


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def twig(llava: Any) -> nn.ModuleList:
    return a_twig(llava)


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_generates_what_the_rule_generates(llava: Any, twig: nn.ModuleList, padding: Any) -> None:
    schedule = Schedule.preset("twigvlm", LAYERS, **SMALL)
    inputs = batch(llava, ROWS, padding=padding)
    rules = [TwigVLM(llava, twig, **SMALL) for _ in ROWS]
    first, expected = [], []
    for rule, (ids, features) in zip(rules, rows_of(llava, inputs), strict=True):
        first.append(rule(ids, features)[-1])
        for _ in range(5):
            ids = torch.cat([ids, rule(ids, features)[-1:].argmax(dim=-1)])
        expected.append(ids[-5:].tolist())
    hidrop.compile(llava, schedule, backend="eager", modules={"twig": twig})
    found = llava.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    out = llava(**inputs, use_cache=True, logits_to_keep=1)
    report = hidrop.compare(llava, **inputs)
    hidrop.restore(llava)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected
    torch.testing.assert_close(out.logits[:, -1], torch.stack(first), rtol=1e-4, atol=1e-4)
    assert report.ok, str(report)
    assert not hasattr(llava, "hidrop_modules")


@torch.no_grad()
def test_each_layer_keeps_the_tokens_of_the_rule(llava: Any, twig: nn.ModuleList) -> None:
    inputs = batch(llava, ROWS, padding="right")
    hidrop.compile(
        llava, "twigvlm(layer=1,average=4,exit=4)", backend="eager", modules={"twig": twig}
    )
    cache = llava(**inputs, use_cache=True).past_key_values
    layout = last_layout(llava)
    hidrop.restore(llava)
    for row, (ids, features) in enumerate(rows_of(llava, inputs)):
        rule = TwigVLM(llava, twig, **SMALL)
        rule(ids, features)
        counts = [layout.counts[layer.query][row] for layer in layout.plan.layers]
        assert counts == rule.counts
        assert rule.stays is not None
        columns = cache.log.columns["prune_1"][row]
        assert (
            columns[columns < inputs["input_ids"].shape[1]].tolist()
            == rule.stays.nonzero().flatten().tolist()
        )
        assert layout.next_ids["prune_1"][row] == layout.next_ids["exit_4"][row] == len(ids)
    # What the branch attends to is in no cache: there are as many layers as the model has, of as many tokens.
    assert [layer.filled for layer in cache.layers] == [
        layout.lengths[k.cache] for k in layout.plan.layers
    ]


@pytest.mark.parametrize("images", [1, 2])
def test_counts_are_those_of_the_paper(images: int) -> None:
    """The authors' three budgets of LLaVA-1.5-7B; of two images `average` counts each."""
    sizes = {"num_layers": 32, "hidden_size": 4096, "intermediate_size": 11008}
    for average, kept in ((192, 227), (128, 134), (64, 41)):
        planned = hidrop.plan(
            f"twigvlm(average={average})", vision_tokens=576 * images, images=images, **sizes
        )
        expected = [576] * 2 + [kept] * 22 + [0] * 8
        # The ceiling is taken once, over all images of a row.
        assert planned.vision_tokens[2] in range(kept * images - images + 1, kept * images + 1)
        if images == 1:
            assert list(planned.vision_tokens) == expected
        # The branch: two layers on all tokens, and keys of a third.
        layer = planned.identity.layer_flops[0]
        assert 2 * layer < planned.event_flops["prune_2"] < 2.2 * layer


@pytest.mark.parametrize(("backbone", "window"), [("mistral", None), ("qwen3", None), ("qwen2", 7)])
@torch.no_grad()
def test_windows_and_norms_of_the_branch_are_the_models_own(backbone: str, window: Any) -> None:
    """Qwen2's layers differ by place: of a branch grown at layer 1 the first has a window, and the second has none.

    As with every score, a window of the layer that scores does not bound the row that is looked at.
    """
    model = tiny_llava(backbone, num_layers=LAYERS, kv_heads=2, sliding_window=window)
    twig = a_twig(model, 2)
    inputs = batch(model, ROWS)
    hidrop.compile(
        model, "twigvlm(layer=1,average=4,exit=4)", backend="eager", modules={"twig": twig}
    )
    report = hidrop.compare(model, **inputs)
    columns = model(**inputs, use_cache=True).past_key_values.log.columns["prune_1"]
    hidrop.restore(model)
    assert report.ok, str(report)
    # Hugging Face's own layers, in a model that is the branch alone behind the first layer.
    plain = tiny_llava(backbone, num_layers=LAYERS, kv_heads=2, sliding_window=window, attn="eager")
    draft, found = hidrop.twig_model(plain, a_twig(plain, 2)), []
    for row, (ids, _) in enumerate(rows_of(model, inputs)):
        if not ids.eq(model.config.image_token_id).any():
            continue
        one = {"input_ids": ids[None], "pixel_values": inputs["pixel_values"][len(found) :][:1]}
        attention = draft(**one, output_attentions=True).attentions[-1][0].mean(0)[-1]
        places = ids.eq(model.config.image_token_id).nonzero().flatten()
        best = places[attention[places].topk(4).indices]
        pads = int(inputs["attention_mask"][row].eq(0).sum())  # on the left
        kept = columns[row] - pads
        assert set(best.tolist()) <= set(kept.tolist())
        assert len(set(places.tolist()) & set(kept.tolist())) == 4
        found.append(best)
    assert len(found) == 3


@torch.no_grad()
def test_shown_dumped_and_replayed(llava: Any, twig: nn.ModuleList, tmp_path: Path) -> None:
    inputs = batch(llava, ROWS)
    schedule = "twigvlm(layer=1,average=4,exit=4)"
    hidrop.compile(llava, schedule, backend="eager", modules={"twig": twig})
    llava(**inputs)
    assert "prune=1:1.0,exit=4,score=twig,average=4" in str(hidrop.explain(llava, **inputs))
    assert "prefill twigs 0-1" in str(hidrop.inspect(llava))
    hidrop.dump(llava, tmp_path)
    replayed = hidrop.replay(tmp_path, llava, **inputs)
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )
    drawn = hidrop.heatmap(llava, inputs, processor, size=48)
    planned = hidrop.plan(schedule, llava, text_tokens=5)
    counted = hidrop.count_launches(llava, planned)
    hidrop.restore(llava)
    assert replayed.ok, str(replayed)
    assert len(drawn) == 3
    # The weights of a branch are the model's, and are not written again.
    assert not [path for path in tmp_path.rglob("*.pt") if path.stat().st_size > 50_000]
    shown = next(tmp_path.glob("prefill*/*_prune.py")).read_text()
    assert "twig__layers__0__self_attn__q_proj__weight" in shown
    # Of the last layer there are keys and queries alone.
    assert "twig__layers__2__self_attn__k_proj__weight" in shown
    for gone in ("self_attn__v_proj", "self_attn__o_proj", "mlp__up_proj"):
        assert f"twig__layers__2__{gone}__weight" not in shown
    own, ours = (
        hidrop.count_launches(llava, hidrop.plan(s, llava, text_tokens=5))
        for s in ("identity", schedule)
    )
    # A model without a branch is counted with as many of its own layers.
    assert counted.prefill.total == ours.prefill.total > own.prefill.total
