"""Schedules: fields, text form, JSON, presets, pyramids; every error.

Over 400 lines: one table of mistakes and messages is most of it.
"""

import copy
import dataclasses
import itertools
import json
import logging
import pickle
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.methods import METHODS, SCORERS
from hidrop_fx.methods.needs import NEEDS
from hidrop_fx.schedule.keeps import ROUNDINGS, Keeps, keep_count
from hidrop_fx.schedule.presets import PRESETS
from hidrop_fx.schedule.schedule import SCORES, Schedule

HIDROP = ("hidrop-80", "hidrop-64", "hidrop-48")


@st.composite
def any_schedule(draw: st.DrawFn) -> Schedule:
    layers = sorted(draw(st.sets(st.integers(0, 60), max_size=6)))
    ints = iter(sorted(draw(st.lists(st.integers(1, 10_000), min_size=6, max_size=6)))[::-1])
    unit = st.floats(0, 1, exclude_min=True)
    floats = iter(sorted(draw(st.lists(unit, min_size=6, max_size=6)))[::-1])
    prune = {layer: next(floats if draw(st.booleans()) else ints) for layer in layers}
    score = draw(st.sampled_from(SCORES))
    adaptive = SCORERS[score].most is not None
    first = layers[0] if layers else 60
    if any(NEEDS[need].previous for need in SCORERS[score].needs):  # of a layer with vision tokens
        first, layers = (first - 1, layers) if first else (0, [])
        prune = prune if layers else {}
    inject = draw(st.integers(0, first))
    after = max([inject, *layers]) + 1
    return Schedule(
        inject=inject,
        prune=prune,
        exit=draw(st.none() | st.integers(after, after + 20)),
        score=score,
        positions=draw(st.sampled_from(["persistent", "group"] + ["compact"] * (not adaptive))),
        rounding=draw(st.sampled_from(list(ROUNDINGS))),
    )


# --- a value: frozen, hashable, round trips ---


def test_default_schedule_is_the_identity() -> None:
    s = Schedule()
    assert (s.inject, dict(s.prune), s.exit, s.score, s.positions) == (
        0,
        {},
        None,
        "last_token",
        "persistent",
    )


def test_prune_is_sorted_and_immutable() -> None:
    given_ = {14: 10, 10: 215}
    s = Schedule(prune=given_)
    given_[16] = 5
    assert list(s.prune.items()) == [(10, 215), (14, 10)]
    with pytest.raises(TypeError):
        s.prune[10] = 3  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.inject = 3  # type: ignore[misc]


def test_schedule_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        Schedule(8)  # type: ignore[call-arg]


def test_one_token_is_not_all_tokens() -> None:
    one, all_ = Schedule(prune={3: 1}), Schedule(prune={3: 1.0})
    assert one != all_
    assert Keeps({3: 1}) == {3: 1}
    assert Keeps({3: 1}) != {3: 1.0}
    assert Keeps({3: 1}) != 3
    for s in (one, all_):
        assert Schedule.parse(str(s)) == s
        assert Schedule.from_json(s.to_json()) == s


def test_replace_checks_the_changed_schedule() -> None:
    s = Schedule.preset("hidrop-64")
    assert dataclasses.replace(s, positions="compact").prune == s.prune
    assert dataclasses.replace(s, prune={}).prune == {}
    with pytest.raises(ScheduleError, match="prune layer 18 is not before exit=12"):
        dataclasses.replace(s, exit=12, prune={18: 1})


@given(any_schedule())
def test_schedules_survive_json_text_pickle_copy_and_repr(s: Schedule) -> None:
    for same in (
        Schedule.from_json(s.to_json()),
        Schedule.parse(str(s)),
        pickle.loads(pickle.dumps(s)),
        pickle.loads(pickle.dumps(s, protocol=0)),
        copy.deepcopy(s),
        copy.copy(s),
        dataclasses.replace(s),
        eval(repr(s)),
    ):
        assert same == s
        assert hash(same) == hash(s)
        assert list(same.prune) == sorted(same.prune)
    assert len({s, Schedule.from_json(s.to_json())}) == 1


def test_str_is_the_text_form() -> None:
    assert str(Schedule()) == "identity"
    assert str(Schedule(positions="group")) == "positions=group"
    assert (
        str(Schedule(inject=8, prune={14: 0.05, 10: 0.5}, exit=24, positions="compact"))
        == "inject=8,prune=10:0.5+14:0.05,exit=24,positions=compact"
    )


@pytest.mark.parametrize(
    ("schedule", "identity"),
    [
        (Schedule(), True),
        (Schedule(positions="compact"), True),
        (Schedule(positions="group"), False),
        (Schedule(inject=1), False),
        (Schedule(prune={0: 1.0}), False),
        (Schedule(exit=32), False),
    ],
)
def test_identity_is_told_of_schedules_that_change_nothing(
    schedule: Schedule, identity: bool
) -> None:
    assert schedule.identity is identity


def test_numpy_numbers_become_plain() -> None:
    s = Schedule(
        inject=np.int64(2),  # type: ignore[arg-type]
        prune={np.int32(3): np.int16(9), 4: np.float32(0.35), 5: np.float64(0.1)},  # type: ignore[dict-item]
        exit=np.uint8(7),  # type: ignore[arg-type]
    )
    assert s == Schedule(inject=2, prune={3: 9, 4: 0.35, 5: 0.1}, exit=7)
    numbers = [s.inject, s.exit, *s.prune, *s.prune.values()]
    assert [type(n) for n in numbers] == [int, int, int, int, int, int, float, float]
    json.loads(s.to_json())


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inject": True}, r"inject=True is a bool: use an integer >= 0"),
        ({"inject": np.True_}, r"inject=np.True_ is a bool: use an integer"),
        ({"inject": 1.0}, r"inject=1.0 is a float: use an integer"),
        ({"inject": None}, r"inject=None is a NoneType: use an integer"),
        ({"inject": -1}, r"inject=-1 is too small: use an integer >= 0"),
        ({"exit": "24"}, r"exit='24' is a str: use an integer >= 1"),
        ({"exit": False}, r"exit=False is a bool"),
        ({"exit": 0}, r"exit=0 is too small: use an integer >= 1"),
        ({"prune": [(10, 3)]}, r"prune=\[\(10, 3\)\] is a list: use a mapping"),
        ({"prune": None}, r"prune=None is a NoneType: use a mapping"),
        ({"prune": {"10": 3}}, r"prune layer='10' is a str: use an integer"),
        ({"prune": {True: 3}}, r"prune layer=True is a bool"),
        ({"prune": {-2: 3}}, r"prune layer=-2 is too small"),
        ({"prune": {4: 0}}, r"keep 0 at prune layer 4 is not a number of tokens: .*exit=4"),
        ({"prune": {4: -3}}, r"keep -3 at prune layer 4 is not a number of tokens"),
        ({"prune": {4: True}}, r"keep True at prune layer 4 is a bool: use an int >= 1"),
        ({"prune": {4: None}}, r"keep None at prune layer 4 is a NoneType"),
        ({"prune": {4: "10"}}, r"keep '10' at prune layer 4 is a str"),
        ({"prune": {4: Fraction(1, 3)}}, r"keep Fraction\(1, 3\) at prune layer 4 is a Fraction"),
        ({"prune": {4: 1 + 0j}}, r"keep \(1\+0j\) at prune layer 4 is a complex"),
        ({"prune": {4: 0.0}}, r"keep 0.0 at prune layer 4 is not a fraction: .*\(0, 1\]"),
        ({"prune": {4: 1.5}}, r"keep 1.5 at prune layer 4 is not a fraction"),
        ({"prune": {4: float("nan")}}, r"keep nan at prune layer 4 is not a fraction"),
        ({"inject": 9, "exit": 9}, r"inject=9 is not before exit=9: .*smaller inject"),
        ({"inject": 5, "prune": {4: 3}}, r"prune layer 4 lies before inject=5: .*layer 5 or later"),
        ({"exit": 4, "prune": {4: 3}}, r"prune layer 4 is not before exit=4: .*layer 3 or earlier"),
        ({"prune": {4: 10, 6: 20}}, r"keep grows from 10 at prune layer 4 to 20 at prune layer 6"),
        ({"prune": {6: 0.4, 4: 0.3}}, r"keep grows from 0.3 at prune layer 4 to 0.4 at"),
        ({"prune": {4: 10, 5: 0.1, 6: 20}}, r"keep grows from 10 at prune layer 4 to 20 at"),
        ({"score": "cls"}, r"unknown score='cls': choose one of last_token"),
        (
            {"positions": "mrope"},
            r"unknown positions='mrope': .*persistent, compact, gapless, group",
        ),
        ({"positions": ["group"]}, r"unknown positions=\['group'\]"),
    ],
)
def test_contradictory_schedules_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule(**fields)
    assert isinstance(caught.value, HidropError)
    assert isinstance(caught.value, ValueError)


def test_events_at_the_borders_are_allowed() -> None:
    Schedule(inject=4, prune={4: 10, 5: 10, 6: 0.5, 7: 0.5}, exit=8).validate(8)
    Schedule(inject=7, prune={7: 1}).validate(8)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(inject=8), r"inject=8 but the model has 8 layers, 0 to 7: use inject <= 7"),
        (Schedule(prune={8: 3}), r"prune layer 8 but the model has 8 layers.*layer 7 or earlier"),
        (Schedule(exit=9), r"exit=9 but the model has 8 layers: use exit <= 8"),
    ],
)
def test_validate_checks_the_depth(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.validate(8)
    schedule.validate(9)


def test_validate_refuses_a_bad_depth() -> None:
    with pytest.raises(ScheduleError, match="num_layers=0 is too small"):
        Schedule().validate(0)


# --- presets ---


@pytest.mark.parametrize(
    ("name", "prune"),
    [
        ("hidrop-80", {10: 453, 13: 10, 16: 5, 19: 1}),
        ("hidrop-64", {10: 215, 14: 10, 16: 5, 18: 1}),
        ("hidrop-48", {10: 87, 14: 10, 16: 5, 18: 1}),
    ],
)
def test_presets_are_the_papers_schedules(
    name: str, prune: dict[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    assert Schedule.preset(name) == Schedule(inject=8, prune=prune, exit=24)
    assert not caplog.records


def test_identity_preset_fits_any_depth() -> None:
    assert Schedule.preset("identity") == Schedule.preset("identity", 1) == Schedule()
    assert set(PRESETS) == {"identity", *HIDROP, *METHODS}


def test_scaled_presets_equal_arithmetic_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    # 8, 10, 14, 16, 18, 24 times 24/32 are 6, 7.5, 10.5, 12, 13.5, 18: halves go up.
    scaled = Schedule(inject=6, prune={8: 215, 11: 10, 12: 5, 14: 1}, exit=18)
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        assert Schedule.preset("hidrop-64", 24) == scaled
    assert len(caplog.records) == 1
    assert re.search(
        r"hidrop-64 .*scaled to 24 layers it is inject=6,prune=8:215\+11:10\+12:5\+14:1,exit=18",
        caplog.text,
    )


@given(st.sampled_from(HIDROP), st.sampled_from([12, 16, 24, 40]) | st.integers(7, 200))
def test_scaled_presets_keep_their_order(name: str, num_layers: int) -> None:
    s, original = Schedule.preset(name, num_layers), Schedule.preset(name)
    s.validate(num_layers)
    assert s.exit is not None
    events = [s.inject, *s.prune, s.exit]
    assert all(a < b for a, b in itertools.pairwise(events))
    assert s.inject >= 1
    assert s.exit < num_layers
    assert list(s.prune.values()) == list(original.prune.values())
    if num_layers >= 16:
        assert events == [
            int(Fraction(layer * num_layers, 32) + Fraction(1, 2))
            for layer in (original.inject, *original.prune, 24)
        ]


@pytest.mark.parametrize("num_layers", [1, 4, 6])
def test_presets_refuse_too_few_layers(num_layers: int) -> None:
    with pytest.raises(
        ScheduleError, match=rf"num_layers={num_layers} is too small .*need 7 layers"
    ):
        Schedule.preset("hidrop-64", num_layers)


def test_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(ScheduleError, match=r"no preset 'hidrop-65': .*identity, hidrop-80"):
        Schedule.preset("hidrop-65")


# --- text ---


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        (
            "inject=8,prune=10:215+14:10,exit=24",
            Schedule(inject=8, prune={10: 215, 14: 10}, exit=24),
        ),
        (" exit = 24 , inject = 8 ", Schedule(inject=8, exit=24)),
        ("prune= 10 : .5 + 12:5e-2 + 14:1", Schedule(prune={10: 0.5, 12: 0.05, 14: 1})),
        ("prune=3:1.", Schedule(prune={3: 1.0})),
        ("inject=0", Schedule()),
        ("exit=none", Schedule()),
        ("score=last_token,positions=group", Schedule(positions="group")),
        ("hidrop-64", Schedule.preset("hidrop-64")),
        ("identity", Schedule()),
    ],
)
def test_parse_reads_the_text_form(text: str, schedule: Schedule) -> None:
    assert Schedule.parse(text) == schedule


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "''"),
        ("hidrop-65", "'hidrop-65'"),
        ("inject=8;exit=24", "'8;exit=24'"),
        ("inject=8,", "''"),
        ("inject=-1", "'-1'"),
        ("inject=", "'inject='"),
        ("entry=8", "'entry'"),
        ("exit=1.5", "'1.5'"),
        ("prune=10", "'10'"),
        ("prune=10:nan", "'10:nan'"),
        ("prune=10:-1", "'10:-1'"),
        ("prune=10:5+10:3", "'prune layer 10 given twice'"),
        ("inject=1,inject=2", "'inject given twice'"),
        ("x" * 5000, "'xxx"),
    ],
)
def test_parse_shows_the_grammar(text: str, what: str) -> None:
    grammar = r".*write \"inject=8,prune=10:215\+14:10,exit=24\".*hidrop-64"
    with pytest.raises(ScheduleError, match=f"cannot read {re.escape(what)}.*{grammar}"):
        Schedule.parse(text)


def test_parse_refuses_other_types() -> None:
    with pytest.raises(ScheduleError, match="must be a str, not 8: write"):
        Schedule.parse(8)  # type: ignore[arg-type]


def test_parse_takes_a_depth_for_presets(caplog: pytest.LogCaptureFixture) -> None:
    assert Schedule.parse("hidrop-48", 16) == Schedule.preset("hidrop-48", 16)
    assert Schedule.parse("exit=16", 16) == Schedule(exit=16)
    with pytest.raises(ScheduleError, match="exit=17 but the model has 16 layers"):
        Schedule.parse("exit=17", 16)


@pytest.mark.parametrize("name", ["s.json", "a=b.json", "no_suffix"])
def test_parse_reads_a_json_file(tmp_path: Any, name: str) -> None:
    s = Schedule.preset("hidrop-64")
    (tmp_path / name).write_text(s.to_json())
    assert Schedule.parse(str(tmp_path / name)) == s


def test_parse_names_the_file_in_errors(tmp_path: Any) -> None:
    with pytest.raises(ScheduleError, match=r"cannot read a schedule from '.*none.json'.*write"):
        Schedule.parse(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"inyect": 8}')
    with pytest.raises(ScheduleError, match=r"in '.*bad.json': unknown key 'inyect'"):
        Schedule.parse(str(tmp_path / "bad.json"))


# --- JSON ---


def test_to_json_is_the_documented_form() -> None:
    assert json.loads(Schedule(inject=8, prune={10: 215, 14: 0.5}, exit=24).to_json()) == {
        "inject": 8,
        "prune": {"10": 215, "14": 0.5},
        "per": "item",
        "exit": 24,
        "before": None,
        "cache": None,
        "score": "last_token",
        "scoring": "prompt",
        "positions": "persistent",
        "deepstack": "at_inject",
        "rounding": "half_up",
        "selection": "hard",
        "rank": "hard",
        "budget_weight": 1.0,
        "reads": None,
        "freeze_system": False,
        "bottleneck": None,
        "merge": None,
        "average": None,
    }
    assert Schedule.from_json("{}") == Schedule()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not JSON .*write an object such as {\"inject\": 8"),
        (
            "[8]",
            r"must be an object with the keys inject, prune, per, exit, before, reads, freeze_system, bottleneck, cache, score, scoring, positions",
        ),
        (
            '{"injekt": 8, "x": 1}',
            r"unknown key 'injekt', 'x' .*the keys are inject, prune, per, exit, before, reads, freeze_system, bottleneck, cache, score, scoring, positions",
        ),
        ('{"inject": 8, "inject": 9}', r"key 'inject' is given twice"),
        ('{"prune": {"10": 3, "010": 2}}', r"key 10 is given twice"),
        ('{"prune": {"ten": 3}}', r"prune layer 'ten' is not a number"),
        ('{"prune": {"-1": 3}}', r"prune layer '-1' is not a number"),
        ('{"prune": null}', r"prune=None is a NoneType"),
        ('{"prune": {"10": NaN}}', r"keep nan at prune layer 10"),
        ('{"inject": true}', r"inject=True is a bool"),
        ('{"inject": 8.0}', r"inject=8.0 is a float"),
    ],
)
def test_from_json_refuses_bad_documents(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(text)


# --- keep counts ---


@pytest.mark.parametrize(
    ("keep", "vision_tokens", "count"),
    [
        (0.15, 10, 2),  # 1.5; the binary 0.15 is below it
        (0.35, 10, 4),
        (0.145, 100, 15),
        (0.285, 100, 29),
        (0.5, 1, 1),
        (0.5, 3, 2),
        (0.5, 5, 3),
        (0.14, 10, 1),
        (0.16, 10, 2),
        (1e-9, 576, 1),
        (1.0, 576, 576),
        (0.9999, 576, 576),
        (0.049999, 10, 1),
        (np.float64(0.15), 10, 2),
        (0.5, 0, 0),
        (7, 0, 0),
        (7, 5, 5),
        (7, 9, 7),
    ],
)
def test_keep_count_is_rounded_half_up(keep: int | float, vision_tokens: int, count: int) -> None:
    assert keep_count(keep, vision_tokens) == count


@given(st.integers(1, 999), st.integers(1, 5000))
def test_fractions_are_read_as_decimals(thousandths: int, vision_tokens: int) -> None:
    exact = (2 * thousandths * vision_tokens + 1000) // 2000
    assert keep_count(thousandths / 1000, vision_tokens) == max(1, exact)


def test_int_keeps_count_per_image() -> None:
    s = Schedule(prune={10: 215, 14: 10, 16: 0.01})
    assert s.keep_counts(576) == {10: 215, 14: 10, 16: 6}
    assert s.keep_counts(3 * 576, images=3) == {10: 645, 14: 30, 16: 17}


def test_keep_counts_are_never_more_than_there_is() -> None:
    assert Schedule(prune={1: 300, 2: 200}).keep_counts(100) == {1: 100, 2: 100}
    assert Schedule(prune={1: 0.1, 2: 200, 3: 0.05}).keep_counts(1000) == {1: 100, 2: 100, 3: 50}
    assert Schedule(prune={1: 5, 2: 1.0}).keep_counts(1000) == {1: 5, 2: 5}
    assert Schedule(prune={1: 5, 2: 0.5}).keep_counts(0, images=0) == {1: 0, 2: 0}


@given(any_schedule(), st.integers(0, 2000), st.integers(1, 4))
def test_keep_counts_never_grow(s: Schedule, vision_tokens: int, images: int) -> None:
    counts = [vision_tokens, *s.keep_counts(vision_tokens, images).values()]
    assert counts == sorted(counts, reverse=True)
    assert vision_tokens == 0 or min(counts) >= 1


def test_keep_count_refuses_bad_arguments() -> None:
    s = Schedule(prune={1: 3})
    with pytest.raises(ScheduleError, match="vision_tokens=-1 is too small"):
        s.keep_counts(-1)
    with pytest.raises(ScheduleError, match="vision_tokens=5 but images=0: give the number"):
        s.keep_counts(5, images=0)
    with pytest.raises(ScheduleError, match=r"images=1.5 is a float"):
        s.keep_counts(5, images=1.5)  # type: ignore[arg-type]
