"""A branch grown from a model's layers: what it is made of, its training, saving, errors, and drafts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx import HidropError, Schedule, ScheduleError
from tests.support import counter
from tests.support.generation import new_tokens
from tests.support.gradients import assert_gradients_close, gradients, step
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import compiled_eagerly
from tests.support.twig import TwigVLM, a_twig, rows_of, shallow_loss

ROWS: Any = [[5, 6, IMAGE, 7, 8, 9, 10, 4], [8, 9, IMAGE, 4, 3, 3, 11, 12, 5, 6], [IMAGE, 4, 9, 3]]
LAYERS = 5
SMALL = {"layer": 1, "average": 4, "exit": 4}
SCHEDULE = "twigvlm(layer=1,average=4,exit=4)"


@pytest.fixture
def llava() -> Any:
    return tiny_llava("llama", num_layers=LAYERS, kv_heads=2)


@pytest.fixture
def twig(llava: Any) -> nn.ModuleList:
    return a_twig(llava)


def labelled(model: Any, rows: Any = ROWS) -> dict[str, Any]:
    inputs: dict[str, Any] = batch(model, rows, padding="right")
    labels = inputs["input_ids"].clone()
    labels[:, :12] = -100  # images and what comes before them
    labels[inputs["attention_mask"] == 0] = -100
    return {**inputs, "labels": labels}


def test_a_branch_is_grown_from_the_layers_behind_its_place(llava: Any) -> None:
    own = llava.model.language_model.layers
    grown = hidrop.grow_twig(llava, 2, layer=2)
    assert isinstance(grown, nn.ModuleList)
    for mine, theirs in zip(grown, own[2:4], strict=True):
        assert mine is not theirs
        assert mine.self_attn.config is theirs.self_attn.config
        for (name, value), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=name)
            assert value is not other
            assert value.requires_grad
    assert not any(p.requires_grad for p in llava.parameters())
    free = tiny_llava("llama", num_layers=LAYERS)
    assert len(hidrop.grow_twig(free, freeze=False)) == 3
    assert all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layers": 4},
            r"layers=4 from layer=2 on needs 6 layers, and the model has 5; use layers <= 3",
        ),
        ({"layers": 0}, "layers=0 is too small"),
        ({"layers": 1.5}, "layers=1.5 is a float"),
        ({"layer": -1}, "layer=-1 is too small"),
        ({"layer": 5}, "use layers <= 0, or an earlier layer"),
    ],
)
def test_a_branch_that_cannot_be_grown(llava: Any, arguments: Any, message: str) -> None:
    with pytest.raises(HidropError, match=message):
        hidrop.grow_twig(llava, **arguments)
    assert all(p.requires_grad for p in llava.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_shallow_model_trains_the_branch_alone(llava: Any, compiled: bool) -> None:
    """Its loss is that of next tokens, through the model's norm and head; gradients equal those of a loop of plain tensors."""
    twig = hidrop.grow_twig(llava, 2, layer=1)
    inputs = labelled(llava)
    rows = rows_of(llava, inputs)
    masks = inputs["attention_mask"].bool()
    labels = [of[mask] for of, mask in zip(inputs["labels"], masks, strict=True)]
    expected = shallow_loss(llava, twig, 1, rows, labels)
    expected.backward()
    wanted = gradients(twig)
    assert len(wanted) == len(list(twig.parameters()))
    twig.zero_grad(set_to_none=True)
    shallow = hidrop.twig_model(llava, twig).train()
    if compiled:
        hidrop.compile(shallow, Schedule(), backend="eager")
    loss = shallow(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert_gradients_close(gradients(twig), wanted)
    assert all(p.grad is None for p in llava.parameters())
    trained = [name for name, p in shallow.named_parameters() if p.requires_grad]
    assert all(
        ".language_model.layers.1." in n or ".language_model.layers.2." in n for n in trained
    )
    # The model itself is as it was.
    assert len(llava.get_decoder().layers) == llava.config.text_config.num_hidden_layers == LAYERS


def test_training_lowers_the_loss_and_moves_what_the_schedule_keeps(llava: Any) -> None:
    twig = hidrop.grow_twig(llava, 2, layer=1)
    shallow, inputs = hidrop.twig_model(llava, twig).train(), labelled(llava)
    hidrop.compile(llava.eval(), SCHEDULE, backend="eager", modules={"twig": twig})
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad], lr=3e-2)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    losses, kept = [], []
    for _ in range(8):
        with (
            torch.no_grad(),
            counter.expect(captures=None if not kept else 0, programs=None if not kept else 0),
        ):
            kept.append(llava(**prompt, use_cache=True).past_key_values.log.columns["prune_1"])
        loss = shallow(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(kept[0], kept[-1])
    for row, (ids, features) in enumerate(rows_of(llava, prompt)):
        rule = TwigVLM(llava, twig, **SMALL)
        with torch.no_grad():
            rule(ids, features)
            now = llava(**prompt, use_cache=True).past_key_values.log.columns["prune_1"][row]
        assert rule.stays is not None
        assert now[now < 18].tolist() == rule.stays.nonzero().flatten().tolist()


def test_tuning_the_model_under_its_branch_leaves_the_branch_alone(
    llava: Any, twig: nn.ModuleList
) -> None:
    """Scores choose, and pass no gradient on; the loss is that of the model on what stays."""
    inputs = labelled(llava)
    with compiled_eagerly(llava, SCHEDULE, modules={"twig": twig}):
        report = hidrop.compare(llava.train(), **inputs)
        assert report.ok, str(report)
        _, found = step(llava, inputs)
    assert found
    assert not any("twig" in name for name in found)
    llava.eval()


def test_soft_ranks_train_the_branch_with_the_model(llava: Any, twig: nn.ModuleList) -> None:
    """A learned selection passes gradients to scores, and so to the branch; the plain loop's are the same."""
    schedule = "prune=1:0.5,exit=4,score=twig,selection=dtopk,rank=soft"
    inputs = labelled(llava)
    with compiled_eagerly(llava, schedule, modules={"twig": twig}):
        _, found = step(llava.train(), inputs)
    # The last layer's values, its output and MLP are not computed.
    assert sum("twig" in name for name in found) == 2 * 9 + 3
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found.values())


@torch.no_grad()
@pytest.mark.slow
def test_another_twig_makes_another_program_and_new_weights_do_not(
    llava: Any, twig: nn.ModuleList
) -> None:
    inputs = batch(llava, [ROWS[1]])
    schedule = "twigvlm(layer=1,average=4,exit=4)"

    def stays() -> list[int]:
        found = llava(**inputs, use_cache=True).past_key_values.log.columns["prune_1"]
        return list(found[0].tolist())

    def wanted(layers: Any) -> list[int]:
        rule = TwigVLM(llava, layers, **SMALL)
        rule(*rows_of(llava, inputs)[0])
        assert rule.stays is not None
        return list(rule.stays.nonzero().flatten().tolist())

    mine = copy.deepcopy(twig)
    other = a_twig(llava, 2)
    hidrop.compile(llava, schedule, backend="eager", modules={"twig": mine})
    assert stays() == wanted(mine)
    with counter.expect(captures=0):
        for parameter in mine.parameters():
            parameter.mul_(-1.5)  # in place, as an optimizer steps
        negated = stays()
    assert negated == wanted(mine)
    hidrop.compile(llava, schedule, backend="eager", modules={"twig": other})
    assert stays() == wanted(other)
    other[1].self_attn.k_proj = nn.Linear(32, 16, bias=False)  # a module that is replaced
    assert stays() == wanted(other)
    other.append(copy.deepcopy(twig[2]))  # another depth
    assert stays() == wanted(other)
    hidrop.compile(llava, schedule, backend="eager")  # a compiled model keeps its branch
    assert llava.hidrop_modules.twig is other
    assert stays() == wanted(other)
    hidrop.restore(llava)


@pytest.mark.parametrize("pretrained", [False, True])
@torch.no_grad()
def test_saved_and_loaded(
    llava: Any, twig: nn.ModuleList, tmp_path: Path, pretrained: bool
) -> None:
    inputs = batch(llava, ROWS)
    state = set(llava.state_dict())
    hidrop.compile(llava, SCHEDULE, backend="eager", modules={"twig": twig})
    expected = new_tokens(llava, inputs)
    assert set(llava.state_dict()) == state
    llava.load_state_dict(llava.state_dict())
    if pretrained:
        llava.save_pretrained(tmp_path)
    hidrop.save(llava, tmp_path)
    other = tiny_llava("llama", num_layers=LAYERS, kv_heads=2)
    hidrop.load(other, tmp_path, backend="eager")
    assert [each.self_attn.layer_idx for each in other.hidrop_modules.twig] == [1, 2, 3]
    assert new_tokens(other, inputs) == expected
    # Into a model that has a branch already: the same modules, with the saved weights.
    mine = other.hidrop_modules.twig
    for parameter in mine.parameters():
        parameter.zero_()
    hidrop.load(other, tmp_path)
    assert other.hidrop_modules.twig is mine
    assert new_tokens(other, inputs) == expected
    twin = copy.deepcopy(other)
    assert twin.hidrop_modules.twig is not mine
    hidrop.restore(other)
    assert not hasattr(other, "hidrop_modules")
    assert new_tokens(twin, inputs) == expected
    (tmp_path / "hidrop_modules.safetensors").unlink()
    with pytest.raises(HidropError, match=r"hidrop_modules\.safetensors does not exist"):
        hidrop.load(other, tmp_path, backend="eager")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda twig: {"twig": [*twig]}, r"modules\['twig'\] is a list; pass an nn.ModuleList"),
        (lambda twig: {"twig": nn.ModuleList()}, "is empty; pass an nn.ModuleList"),
        (lambda twig: {"twigs": twig}, "modules has 'twigs', which no schedule reads; it may have 'twig'"),
        (lambda twig: twig, "modules=ModuleList: pass a dictionary"),
        (lambda twig: {"twig": nn.ModuleList([nn.Linear(32, 32)])}, r"\[0\] is a Linear, the model's layers are LlamaDecoderLayer"),
        (lambda twig: {"twig": twig.to(torch.bfloat16)}, r"\[0\].* is torch.bfloat16 on cpu, the model's layers are torch.float32"),
        (lambda twig: {"twig": tiny_llava("llama", hidden_size=48, kv_heads=2).get_decoder().layers}, r"\[0\].hidden_size is 48, that of the model's own layer 32"),
        (lambda twig: {"twig": tiny_llava("llama", heads=8, kv_heads=4).get_decoder().layers}, r"self_attn.head_dim is 4, that of the model's own layer 8"),
        (lambda twig: {}, r"score='twig' reads modules\['twig'\], an nn.ModuleList .*; write hidrop.compile\(model, schedule, modules="),
    ],
)  # fmt: skip
def test_a_branch_that_does_not_fit(
    llava: Any, twig: nn.ModuleList, spoil: Any, message: str
) -> None:
    before = dict(vars(llava))
    with pytest.raises(HidropError, match=message):
        hidrop.compile(llava, SCHEDULE, backend="eager", modules=spoil(twig))
    assert vars(llava) == before
    assert not hidrop.is_compiled(llava)


def test_budgets_out_of_reach_are_named(llava: Any, twig: nn.ModuleList) -> None:
    inputs = batch(llava, ROWS)
    for average, message in (
        (
            1,
            r"average=1 leaves -1 of 9 vision tokens \(1 image\) at prune layer 1, with exit=4 of 5 .*from 2 to 7",
        ),
        (9, r"average=9 leaves 12 of 9 vision tokens"),
    ):
        with (
            compiled_eagerly(
                llava, f"twigvlm(layer=1,average={average},exit=4)", modules={"twig": twig}
            ),
            pytest.raises(ScheduleError, match=message),
        ):
            llava(**inputs)
    with pytest.raises(ScheduleError, match="pass num_layers"):
        Schedule.parse(SCHEDULE).keep_counts(9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average": 4}, r"average=4 says what one filter layer keeps in front of an exit"),
        ({"average": 4, "prune": {1: 0.5}, "exit": 3}, r"there are prune=\{1: 0.5\} and exit=3"),
        ({"average": 4, "prune": {1: 1.0, 2: 1.0}, "exit": 3}, "one filter layer"),
        ({"average": 4, "prune": {1: 1.0}}, "exit=None"),
        ({"average": 0, "prune": {1: 1.0}, "exit": 3}, "average=0: use a number"),
        ({"average": True, "prune": {1: 1.0}, "exit": 3}, "average=True: use a number"),
        ({"average": 4, "prune": {1: 1.0}, "exit": 3, "selection": "dtopk"}, "fixes how many tokens stay, which selection='dtopk'"),
        ({"average": 4, "prune": {1: 1.0}, "exit": 3, "score": "value_similarity"}, "score='value_similarity' decides"),
    ],
)  # fmt: skip
def test_bad_schedules_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(**fields)


@torch.no_grad()
def test_used_beside_a_schedule_without_a_branch(
    llava: Any, twig: nn.ModuleList, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = batch(llava, ROWS)
    plain = new_tokens(llava, inputs)
    hidrop.compile(
        llava, {"full": Schedule(), "twig": SCHEDULE}, backend="eager", modules={"twig": twig}
    )
    assert new_tokens(llava, inputs) == plain
    expected = new_tokens(llava, inputs, hidrop_schedule="twig")
    assert expected != plain
    assert new_tokens(llava, inputs) == plain
    with hidrop.use(llava, "twigvlm(layer=2,average=5,exit=4)"):
        assert hidrop.compare(llava, **inputs).ok
    assert "made for the input of layer 1, and scores at layer 2" in caplog.text
    hidrop.compile(llava, Schedule(), backend="eager")
    assert llava.hidrop_modules.twig is twig
    hidrop.restore(llava)
    hidrop.compile(llava, Schedule(), backend="eager")
    with (
        pytest.raises(ScheduleError, match=r"reads modules\['twig'\]"),
        hidrop.use(llava, SCHEDULE),
    ):
        pass
    hidrop.restore(llava)


@pytest.mark.parametrize("backend", ["plain", "eager"])
@torch.no_grad()
def test_the_branch_drafts_for_the_model(llava: Any, backend: str) -> None:
    """The answer is that of the model alone, whatever is drafted, and the draft sees the image."""
    twig = hidrop.grow_twig(llava, 3, layer=1)
    inputs = batch(llava, [ROWS[0]])
    hidrop.compile(llava, SCHEDULE, backend="eager", modules={"twig": twig})
    expected = new_tokens(llava, inputs, 12)
    draft, calls, drafted = hidrop.twig_model(llava), [], []
    features = llava.get_image_features(inputs["pixel_values"]).pooler_output[0]
    if backend == "eager":
        hidrop.compile(draft, Schedule(), backend="eager")
    places = inputs["input_ids"][0].eq(llava.config.image_token_id)
    own = new_tokens(draft, inputs, 12)
    seen = llava.lm_head.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    entering = draft.get_decoder().layers[0].input_layernorm
    noted = entering.register_forward_pre_hook(lambda _, args: drafted.append(args[0]))
    found = new_tokens(llava, inputs, 12, assistant_model=draft)
    noted.remove()
    seen.remove()
    assert found == expected
    assert own != expected, "a draft that is always right shows nothing"
    assert calls
    if backend == "plain":
        prompt = next(
            states for states in drafted if states.shape[1] == inputs["input_ids"].shape[1]
        )
        torch.testing.assert_close(prompt[0][places], features)


def test_a_model_without_a_branch_has_no_shallow_one(llava: Any, twig: nn.ModuleList) -> None:
    with pytest.raises(HidropError, match="compiled without a side branch: pass one"):
        hidrop.twig_model(llava)
    twig[1].self_attn.layer_idx = 7
    with pytest.raises(HidropError, match=r"made for places \[1, 7, 3\]"):
        hidrop.twig_model(llava, twig)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends_agree(llava: Any, twig: nn.ModuleList, backend: str) -> None:
    inputs, trained = batch(llava, ROWS), labelled(llava)
    found = []
    for name in ("eager", backend):
        hidrop.compile(llava.eval(), SCHEDULE, backend=name, modules={"twig": twig})
        with torch.no_grad(), counter.expect():
            tokens = new_tokens(llava, inputs)
        found.append((tokens, *step(llava.train(), trained)))
        hidrop.restore(llava)
    (tokens, loss, gradients), (others, other_loss, other_gradients) = found
    assert tokens == others
    torch.testing.assert_close(loss, other_loss)
    assert_gradients_close(other_gradients, gradients)
