"""History: every stage of a program, as data and as Python."""

from __future__ import annotations

from hidrop_fx.pipeline import pipeline
from hidrop_fx.program.variant import Variant
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


def test_a_stage_is_the_graph_as_it_was_behind_its_pass(llama: CapturedModel) -> None:
    program = llama.program("prefill", **FULL)
    seen = [(str(program.graph), [dict(n.meta) for n in program.graph.nodes if n.op != "output"])]
    for step, options in pipeline.passes_for("prefill", Variant(output="chosen")):
        program.apply(step, **options)
        metas = [dict(n.meta) for n in program.graph.nodes if n.op != "output"]
        seen.append((str(program.graph), metas))
    assert len(seen) == len(program.history)
    assert len({text for text, _ in seen}) > 5
    for stage, (text, metas) in zip(program.history, seen, strict=True):
        assert str(stage.graph) == text
        assert str(len(stage.graph.nodes)) in stage.title
        nodes = [node for node in stage.graph.nodes if node.op != "output"]
        assert all(node.graph is stage.graph for node in nodes)
        for node, meta in zip(nodes, metas, strict=True):
            assert node.meta.keys() == meta.keys()
            assert all(node.meta[name] is meta[name] for name in meta)
    stage.graph.lint()
    assert set(program.graph.nodes).isdisjoint(stage.graph.nodes)


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
