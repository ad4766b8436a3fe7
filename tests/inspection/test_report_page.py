"""`report.html` in headless Chromium, and the pictures of what was kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hidrop_fx as hidrop
from hidrop_fx.inspection.heatmaps.drawing import drawn
from hidrop_fx.inspection.heatmaps.scores import ImageScores
from hidrop_fx.inspection.page.depth import depth
from hidrop_fx.planning import plan
from tests.support.browser import CHROMIUM, Browser
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.paths import ROOT

LARGEST, SLOWEST = 3_000_000, 2.0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a 32-layer program of 576 vision tokens."""
    model = hidrop.compile(
        tiny_llava(num_layers=32, image_tokens=576), "hidrop-64", backend="eager"
    )
    model(**batch(model, [[*range(3, 40), IMAGE, *range(40, 67)]]), logits_to_keep=1)
    return hidrop.dump(model, tmp_path_factory.mktemp("page")) / "report.html"


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with Browser() as browser:
        browser.open(report)
        yield browser


def test_report_page_is_one_small_file(report: Path) -> None:
    text = report.read_text()
    assert len(text.encode()) < LARGEST
    for outside in ('src="http', 'href="http', "@import", "url(http", "fetch("):
        assert outside not in text


def test_report_page_opens_at_once_and_without_complaint(page: Browser, report: Path) -> None:
    quickest = min(page.open(report) for _ in range(3))
    assert quickest < SLOWEST
    assert page.errors == []


def test_report_page_layer_shows_its_tokens(page: Browser) -> None:
    page.run(
        "document.querySelector('.hit[data-layer=\"12\"]').dispatchEvent(new MouseEvent('mouseenter'))"
    )
    told = page.run("document.getElementById('readout').textContent")
    assert told.startswith("Layer 12 sees 215 vision and 64 text tokens")


def test_report_page_event_shows_cost_and_savings(page: Browser) -> None:
    rows = page.run("[...document.querySelectorAll('#events tbody tr')].map(r => r.innerText)")
    assert len(rows) == 6
    cells = next(row for row in rows if row.startswith("prune at layer 10")).split("\t")
    assert cells[1] == "576 → 215"
    assert cells[2].endswith("FLOP")
    assert cells[4].endswith("KiB")


def test_report_page_layers_fold_and_unfold(page: Browser) -> None:
    groups = page.run(
        "[...document.querySelectorAll('#right-code details.group > summary')].map(s => s.innerText)"
    )
    assert any("layers 11 to 13" in text and "3 equal layers" in text for text in groups)
    lines = "document.querySelectorAll('#right-code details[data-layer=\"12\"] [data-line]').length"
    assert page.run(lines) == 0
    page.run(
        "document.querySelector('.hit[data-layer=\"12\"]').dispatchEvent(new MouseEvent('click'))"
    )
    assert until(page, f"{lines} > 20")
    page.run("document.getElementById('fold').click()")
    assert page.run("document.querySelectorAll('#panes details[open]').length") == 0


def test_report_page_search_finds_the_pass_of_a_node(page: Browser) -> None:
    seek(page, "surviving_columns")
    assert until(page, "document.getElementById('found').textContent.endsWith(' nodes')")
    line = "document.querySelector('#right-code [data-line].new')"
    page.run(
        f"{line}.dispatchEvent(new MouseEvent('mousemove', {{bubbles: true, clientX: 9, clientY: 9}}))"
    )
    tip = page.run("document.getElementById('tip').textContent")
    assert "put here by prune" in tip
    assert "i64[batch, prune_10]" in tip
    assert "nothing in captured matches" in page.run(
        "document.getElementById('left-code').textContent"
    )
    seek(page, "")
    assert until(page, "document.getElementById('found').textContent === ''")
    assert page.errors == []


def test_report_page_shows_two_stages_side_by_side(page: Browser) -> None:
    page.run("[...document.querySelectorAll('#stages button')][3].click()")
    chosen = page.run(
        "['left', 'right'].map(s => document.getElementById(s).selectedOptions[0].text)"
    )
    assert chosen == ["2 inject", "3 prune"]


def seek(page: Browser, words: str) -> None:
    page.run(
        "(() => { const s = document.getElementById('search');"
        f"s.value = {words!r}; s.dispatchEvent(new Event('input')); }})()"
    )


def until(page: Browser, expression: str) -> bool:
    deadline = time.monotonic() + 20
    while not page.run(expression):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# The numbers on it.


def test_report_page_layer_costs_add_up_and_events_are_differences() -> None:
    row = plan("hidrop-64", num_layers=32, hidden_size=64, intermediate_size=96, vision_tokens=576)
    data = depth(row)
    assert sum(row.layer_flops) == row.flops
    assert sum(data["kv"]) == row.kv_bytes
    event = next(e for e in data["events"] if e["layer"] == 10)
    without = plan(
        "inject=8,prune=14:10+16:5+18:1,exit=24",
        num_layers=32,
        hidden_size=64,
        intermediate_size=96,
        vision_tokens=576,
    )
    assert event["saved_flops"] == without.flops - row.flops
    assert event["saved_kv"] == without.kv_bytes - row.kv_bytes
    assert (event["before"], event["after"]) == (576, 215)
    shorter = plan(
        "inject=8,exit=24", num_layers=32, hidden_size=64, intermediate_size=96, vision_tokens=576
    )
    assert [e["cost"] for e in depth(shorter)["events"]] == [0, 0]


# Heat maps.


class Processor:
    image_mean, image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_heatmap_has_a_picture_an_image_with_survivors_outlined() -> None:
    model = hidrop.compile(tiny_llava(), "prune=1:5+2:2,exit=3", backend="eager")
    inputs = batch(model, [[5, IMAGE, 7], [8, IMAGE, 9, IMAGE, 3]])
    pictures = hidrop.heatmap(model, inputs, Processor, size=60)
    assert len(pictures) == 3
    assert {picture.size for picture in pictures} == {(14 + 3 * 74, 46 + 60 + 14 + 24)}
    first = np.asarray(pictures[0])
    shown = first[46:106, 14:74].astype(float)
    pixels = inputs["pixel_values"][0] * 0.25 + 0.5
    wanted = (pixels.clamp(0, 1) * 255).mean(dim=(1, 2))
    assert np.allclose(shown.mean(axis=(0, 1)), wanted, atol=3)
    # Cells that were gone before are pale in the second panel, coloured in the first.
    pale = [(first[46:106, x : x + 60].min(axis=2) > 150).mean() for x in (88, 162)]
    assert pale[0] < 0.2 < pale[1]


@pytest.mark.parametrize(
    ("schedule", "inputs", "message"),
    [
        ("exit=2", {"pixel_values": torch.zeros(1, 3, 12, 12)}, "never prunes"),
        ("prune=1:2", {}, "no image in these inputs"),
    ],
)
def test_heatmap_without_anything_to_draw_is_refused(
    schedule: str, inputs: dict[str, Any], message: str
) -> None:
    model = hidrop.compile(tiny_llava(), schedule, backend="eager")
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.heatmap(model, {"input_ids": torch.tensor([[5]]), **inputs}, Processor)


def test_pictures_of_the_docs_are_small() -> None:
    docs = ROOT / "docs"
    for name in ("report.png", "heatmap.png"):
        assert (docs / name).stat().st_size < 200_000
        with Image.open(docs / name) as picture:
            assert picture.width > 700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(1, 2, 3, 12, 12)}, r"shape \(1, 2, 3, 12, 12\).*not crops"),
        ({"pixel_values": torch.zeros(1, 3, 12, 16)}, r"1 images have 9 tokens.* 3 x 4 = 12 each"),
        ({"pixel_values": torch.zeros(2, 3, 12, 12)}, "2 images have 9 tokens"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 11, 32)}, "need input_ids"),
    ],
)
def test_heatmap_refuses_images_that_are_no_grid(changes: dict[str, Any], message: str) -> None:
    model = hidrop.compile(tiny_llava(), "prune=1:2", backend="eager")
    inputs = batch(model, [[5, IMAGE, 7]])
    with pytest.raises(hidrop.InputError, match=message):
        hidrop.heatmap(model, {**inputs, **changes}, Processor)


def test_heatmap_draws_a_grid_that_is_not_square() -> None:
    kept = torch.zeros(8, dtype=torch.bool)
    entry = ImageScores(layer=2, scores=torch.arange(8.0), kept=kept)
    sheet = np.asarray(drawn(Image.new("RGB", (80, 40)), [entry], 80, (2, 4)))
    assert sheet.shape[:2] == (46 + 40 + 14 + 24, 14 + 2 * 94)
    panel = sheet[46:86, 108:188].astype(int)
    # Ranks rise from left to right, and from the first row of tokens to the second.
    light = panel.sum(axis=2)
    assert light[10, 10] < light[10, 70] < light[30, 70]


# Narrow screens, dark ones, and what was measured.


def test_report_page_fits_a_narrow_screen(report: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with Browser(390, 1800) as browser:
        browser.open(report)
        assert browser.run("document.documentElement.scrollWidth") == 390
        assert (
            browser.run("document.querySelector('#chart svg').getBoundingClientRect().width") > 800
        )
        assert browser.errors == []


def test_report_page_chart_marks_events(page: Browser) -> None:
    drawn_in = "getComputedStyle(document.querySelector('#chart .mark')).stroke"
    assert page.run(drawn_in) not in ("none", "")


def test_report_page_has_a_section_for_a_calibration(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_llava()
    batches = [batch(model, [[5, IMAGE, 7, 8], [9, IMAGE, 3, 4]], seed=n) for n in range(2)]
    found = hidrop.calibrate(model, batches, windows=(1,), tops=(3,), progress=False)
    model = hidrop.compile(model, "prune=1:4", backend="eager")
    text = (hidrop.dump(model, tmp_path, calibration=found) / "report.html").read_text()
    assert "data:image/png;base64," in text
    with pytest.raises(hidrop.HidropError, match="calibration is a dict; pass what"):
        hidrop.dump(model, tmp_path, calibration={})  # type: ignore[arg-type]
    if CHROMIUM is None:
        return
    for width, dark in ((1200, True), (390, False)):
        with Browser(width, 3000) as browser:
            if dark:
                browser.prefer_dark()
            browser.open(tmp_path / "report.html")
            assert not browser.run("document.getElementById('calibration').hidden")
            assert browser.run("document.querySelector('#measured img').naturalWidth") > 300
            assert browser.run("document.querySelectorAll('#measured table').length") > 0
            assert browser.run("document.documentElement.scrollWidth") == width
            paper = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") != dark
            assert browser.errors == []
