"""History: every stage of a program, as data and as Python."""

from __future__ import annotations

from tests.support.captured import FULL, CapturedModel


def test_history_records_every_stage(llama: CapturedModel) -> None:
    program = llama.finished("prefill", "chosen", **FULL)
    assert [(s.name, dict(s.options), s.result.matched) for s in program.history] == [
        ("captured", {}, 4),
        ("split_streams", {"masks": ()}, 1),
        ("inject", {}, 1),
        ("prune", {}, 1),
        ("exit_vision", {}, 1),
        ("positions", {}, 0),
        ("attention", {}, 4),
        ("kv_cache", {}, 4),
        ("head", {"chosen": True}, 1),
    ]
    sizes = [len(s.graph.nodes) for s in program.history]
    assert sizes[0] == len(llama.captured.module.graph.nodes)
    assert sizes[-1] == len(program.graph.nodes)
    assert all(s.milliseconds > 0 for s in program.history[1:])


def test_a_stage_reads_as_python_with_the_names_of_the_functions(llama: CapturedModel) -> None:
    program = llama.finished(**FULL)
    codes = {s.name: s.code for s in program.history}
    assert "def forward(self, inputs_embeds, position_ids, mask)" in codes["captured"]
    assert "hidrop.attention" in codes["captured"]
    assert "merge_tokens(add_5, vision_embeds, merge_index)" in codes["inject"]
    assert "merge_tokens" not in codes["split_streams"]
    for name in ("attention_scores(", "surviving_columns(", "take_keys("):
        assert name in codes["prune"]
        assert name not in codes["inject"]
    assert "causal_attention(" in codes["attention"]
    assert "hidrop.attention" not in codes["attention"]
    title = str(program.history[3]).splitlines()[0]
    nodes = len(program.history[3].graph.nodes)
    assert title.startswith(f"# prune: 1 matched, {nodes} nodes, ")
    assert title.endswith("ms. filter layers [2]")
    assert str(program.history[-1]).startswith("# head chosen=False: 1 matched")
