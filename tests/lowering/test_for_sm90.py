"""What Inductor writes for an H100: layers, prunes and backward passes, lowered and assembled without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import BACKBONES

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="needs Triton's compiler: pip install --no-deps triton",
    ),
]

LEFT_TO_PYTORCH = ("mm", "addmm", "bmm", "_scaled_dot_product")
"""Matrix products and attention; whatever else is not fused is a fallback."""
SORTS = ("sort", "searchsorted")
"""Of token selection, which Inductor leaves to PyTorch where rows may be long."""
MOST_KERNELS = {"layer": 9, "scoring": 13, "backward": 9, "decode program": 25}
"""Launches of Triton kernels: of one layer, of one scoring, in a backward, of a token through three layers. Windows take
three more a layer than plain causal attention does, for masks; biases three more in a backward, for their sums."""


@pytest.fixture(scope="module", params=BACKBONES)
def lowered(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Lower in a process of its own: the simulation replaces torch.cuda, and there is no way back."""
    command = [sys.executable, "-m", "tests.support.sm90", request.param]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def is_scoring(graph: dict[str, Any]) -> bool:
    return " score " in graph["name"] or " prune " in graph["name"]


def test_all_is_lowered_and_assembled(lowered: dict[str, Any]) -> None:
    assert lowered["failures"] == lowered["fallbacks"] == lowered["breaks"] == []
    assert lowered["kernels"]
    assert lowered["configurations"] >= lowered["kernels"]
    kinds = Counter(graph["kind"] for graph in lowered["graphs"])
    names = " ".join(graph["name"] for graph in lowered["graphs"])
    assert kinds["forward"] == kinds["backward"] >= 3
    assert kinds["inference"] >= 4
    assert all(part in names for part in ("prefill", "decode program", "train", "prune", "score"))


def test_nothing_but_products_attention_and_sorts_is_left_to_pytorch(
    lowered: dict[str, Any],
) -> None:
    for graph in lowered["graphs"]:
        allowed = LEFT_TO_PYTORCH + (SORTS if is_scoring(graph) else ())
        left = [c for c in graph["calls"] if not c.removeprefix("aten.").startswith(allowed)]
        assert not left, (graph["name"], graph["kind"], graph["calls"])


def test_no_product_is_raised_to_32_bit_but_that_of_the_scores(lowered: dict[str, Any]) -> None:
    """Scores are a softmax in 32 bit of the logits of a few rows: one product a scoring, two in its backward."""
    for graph in lowered["graphs"]:
        most = (2 if graph["kind"] == "backward" else 1) if is_scoring(graph) else 0
        assert len(graph["wide"]) <= most, (graph["name"], graph["kind"], graph["wide"])


def test_attention_takes_flash_kernels_where_no_mask_is(lowered: dict[str, Any]) -> None:
    chosen = lowered["attention"]
    assert not [name for name in chosen if name.startswith(("math", "cudnn"))], chosen
    assert [name for name in chosen if name.startswith("flash")] or all(
        name.endswith(" masked") for name in chosen
    )


def test_kernels_are_no_more_than_they_were(lowered: dict[str, Any]) -> None:
    for graph in lowered["graphs"]:
        sort = "scoring" if is_scoring(graph) else "layer"
        sort = "backward" if graph["kind"] == "backward" else sort
        most = MOST_KERNELS.get(graph["name"], MOST_KERNELS[sort])
        assert 0 < graph["kernels"] <= most, (graph["name"], graph["kind"], graph["kernels"])
