"""Drop the vision tokens that the prompt attends to least, at the input of a filter layer.

    keys    = rope(k_proj(norm(hidden)))                     # of every token, once
    query   = rope(q_proj(norm(hidden[query_places])))       # of the query rows only
    kept    = best(softmax(query @ keys.T), keep)            # plus all text, in order
    hidden, keys = hidden[kept], keys[kept]                  # gathered, not projected again
    hidden  = layer(hidden, keys)                            # q and v of the survivors only

With a merge the states of dropped tokens go into those of survivors, whose keys are projected from what they are
then, as in any layer:

    hidden[j] = mean(hidden[j], *(hidden[i] for i in dropped if nearest[i] == j))
    hidden    = layer(hidden[kept])

A merge may add tokens instead, which join the survivors at columns of their own:

    hidden, columns = cat([hidden[kept], recycled(hidden[dropped])])[order], ...

While ratios are learned, survivors carry a gate: ones, with the gradient of their survival. The layer's
norm takes a factor on its input away again, so the values it attends to are multiplied by it as well:

    hidden, values = gate * hidden, gate * values

Before:  %q, %k, %v = project(%add_59) ; %attention = attention(%q, %k, %v)
After:   %keys = project_k(%add_59) ; %rows = project_q(take_tokens(%add_59, %places))
         %scores = attention_scores(%rows, %keys, ...)
         %columns = surviving_columns(%scores, ...) ; %index = find_columns(...)
         %q, %v = project(take_tokens(%add_59, %index))
         %attention = attention(%q, take_keys(%keys, %index), %v)

The projections are copies of the layer's own nodes, so q/k norms, biases, LoRA and quantised weights
come along. Where positions are renumbered (`compact`) the survivors' keys turn with their new ids and
are projected again: there are few of them.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.methods import MERGES, SCORERS, Scorer
from hidrop_fx.methods.score_check import check_score
from hidrop_fx.methods.scoring import reads_attention
from hidrop_fx.ops import tokens
from hidrop_fx.ops.behind import columns_behind, of_new, with_past
from hidrop_fx.passes.past import past_input, past_shown
from hidrop_fx.passes.processes import (
    all_heads,
    entering_heads,
    processes_of,
    scored_alike,
)
from hidrop_fx.passes.score_inputs import Subgraphs, key_of, score_inputs, value_of
from hidrop_fx.passes.segments import new_segment, slots_input
from hidrop_fx.planning import Event, Plan
from hidrop_fx.program.inputs import InputSpec, PromptCall
from hidrop_fx.program.program import PassResult, Program, SegmentNodes


def prune(program: Program, plan: Plan) -> PassResult:
    """Score and drop vision tokens at the layer of every prune."""
    events = plan.of_kind("prune")
    if not events:
        return PassResult(matched=0, note="the schedule prunes nowhere")
    for event in events:
        _prune_at(program, plan, event)
    return PassResult(
        matched=len(events), note=f"filter layers {[event.layer for event in events]}"
    )


def _prune_at(program: Program, plan: Plan, event: Event) -> None:
    region, schedule = program.regions[event.layer], plan.schedule
    before = region.nodes[0]
    segment, planned = program.parent_of(event), plan.opened_by(event)
    adaptive = SCORERS[schedule.score].most is not None
    keep = program.add_input(_keep_spec(event))
    slots = slots_input(program, planned)
    is_vision = program.placeholder_named("column_is_vision")

    merge = None if event.option("merge") is None else MERGES[str(event.option("merge"))]
    also = ("key",) if merge is not None and merge.added is None else ()
    scores, keys = _scores(program, region, segment, event, schedule.soft_ranks, also)
    subgraph = _moving_subgraph(program, region)
    call = partial(program.call, before=before, subgraph=subgraph)
    # Where the rule itself says which stay, fewer may.
    select = tokens.chosen_columns if adaptive else tokens.surviving_columns
    columns = call(select, scores, segment.columns, is_vision, keep, slots)
    index = call(tokens.find_columns, segment.columns, columns)
    if merge is None:
        hidden = call(tokens.take_tokens, region.hidden, index)
    elif merge.added is None:
        assert keys is not None
        before_prune = (region.hidden, all_heads(program, call, keys), segment.columns)
        hidden = call(merge.function, *before_prune, columns, index, is_vision)
    else:
        merged, pool, joining = (program.add_input(spec) for spec in _added_specs(event))
        scored = (region.hidden, scores, segment.columns, is_vision)
        added = call(merge.function, *scored, keep, merged, pool, joining)
        order = call(tokens.merge_index, columns, joining, slots)
        hidden = call(tokens.take_tokens, region.hidden, index)
        hidden = call(tokens.merge_tokens, hidden, added, order)
        columns = call(tokens.merge_columns, columns, joining, order)
    if schedule.learns and program.differentiable:
        gate = _gate(program, region, segment, scores, index, schedule.soft_ranks)
        hidden = program.call(tokens.gate_states, hidden, gate, before=before)
        if not region.is_tokenwise:
            _gate_values(program, region, gate)
    kept = new_segment(program, planned, columns=columns, before=before, subgraph=subgraph)

    region.read(region.hidden, hidden)
    region.hidden = hidden
    program.enter(kept)
    if keys is not None and merge is None and not schedule.position_rule.renumbers_after_prunes:
        gathered = call(tokens.take_keys, keys, index)
        region.attention.replace_input_with(key_of(region), gathered)


def _keep_spec(event: Event) -> InputSpec:
    name, fill = f"keep_{event.layer}", lambda call: call.kept_tokens(event.name)
    return InputSpec(name, ("batch",), torch.int64, fill)


def _added_specs(event: Event) -> tuple[InputSpec, InputSpec, InputSpec]:
    """Return the inputs of a merge that adds tokens: how many are merged, arange of the most, columns of the added."""
    name, layer = event.name, event.layer

    def merged(call: PromptCall) -> torch.Tensor:
        return torch.tensor(call.layout.merged[name], device="cpu")

    def pool(call: PromptCall) -> torch.Tensor:
        return torch.arange(call.layout.lengths[f"merged_{name}"], device="cpu")

    def added(call: PromptCall) -> torch.Tensor:
        return call.layout.added_columns[name]

    return (
        InputSpec(f"merged_{layer}", ("batch",), torch.int64, merged),
        InputSpec(f"slots_merged_{layer}", (f"merged_{name}",), torch.int64, pool),
        InputSpec(f"added_columns_{layer}", ("batch", f"added_{name}"), torch.int64, added),
    )


def _gate(
    program: Program,
    region: Region,
    segment: SegmentNodes,
    scores: fx.Node,
    index: fx.Node,
    soft: bool,
) -> fx.Node:
    """Compute ones [B, T] through which the layer's ratio (and the scores) get their gradient."""
    before, layer = region.nodes[0], region.layer
    ratio = program.add_input(
        InputSpec(f"ratio_{layer}", (), torch.float32, lambda call: call.ratio(layer))
    )
    is_vision = program.placeholder_named("column_is_vision")
    mask = program.call(
        tokens.survival_mask, scores, segment.columns, is_vision, ratio, soft, before=before
    )
    return program.call(tokens.survival_gate, mask, index, before=before)


def _gate_values(program: Program, region: Region, gate: fx.Node) -> None:
    attention, value = region.attention, value_of(region)
    gate = entering_heads(program, gate, value, attention)
    gated = program.call(tokens.gate_values, value, gate, before=attention)
    gated.meta["nn_module_stack"] = attention.meta.get("nn_module_stack")
    gated.meta["val"] = value.meta["val"]
    region.nodes.insert(region.nodes.index(attention), gated)
    attention.replace_input_with(value, gated)


def _scores(
    program: Program,
    region: Region,
    segment: SegmentNodes,
    event: Event,
    soft_ranks: bool,
    also: Collection[str],
) -> tuple[fx.Node, fx.Node | None]:
    """Score the tokens before a prune [B, S]; return their keys [B, G, S, d] too if they are read.

    Args:
        also: names of what is read of the filter layer beside the score's own parameters.
    """
    assert event.scorer is not None
    scorer, before = SCORERS[event.scorer], region.nodes[0]
    subgraph = _scoring_subgraph(region)
    subgraphs = Subgraphs(
        score=subgraph,
        keys=f"keys_{region.layer}",
        move=None if program.differentiable else subgraph,
    )
    given = score_inputs(scorer, program, region, segment, subgraphs, also)
    shape, count = region.kv_shape, processes_of(program, region)
    check_score(
        scorer,
        heads=count * region.attention.meta["val"].shape[1],
        key_heads=count * shape.heads,
        head_dim=shape.key_width,
        value_dim=shape.value_width,
        width=program.width,
        dtype=program.dtype,
    )
    read = given | _with_past(program, region, segment, scorer, subgraphs, given)
    arguments = [read[name] for name in scorer.parameters]
    # What is drawn anew is not compiled: generated code would draw other numbers than a plain run.
    call = partial(program.call, before=before, subgraph=subgraph if scorer.deterministic else None)
    made, scores = scored_alike(program, call, scorer, arguments)
    added = {name: given[name] for name in scorer.optional if given.get(name) is not None}
    made.kwargs = added | scorer.keywords
    if "columns" in read and read["columns"] is not given["columns"]:
        scores = call(of_new, scores, past_shown(program, _scored_layer(program, region, scorer)))
    if scorer.differentiable and not soft_ranks:
        scores = call(tokens.detached, scores)
    return scores, given.get("key")


def _scored_layer(program: Program, region: Region, scorer: Scorer) -> Region:
    """Return the layer whose attention a score reads: the filter layer, or the one before."""
    return program.regions[region.layer - ("previous_key" in scorer.parameters)]


def _with_past(
    program: Program,
    region: Region,
    segment: SegmentNodes,
    scorer: Scorer,
    subgraphs: Subgraphs,
    given: Mapping[str, Any],
) -> dict[str, fx.Node]:
    """Return keys and columns of the past and a turn, by name, where a score of a later turn is attention.

    Queries divide their attention among all that they see; scores of what the cache holds are not asked for.
    """
    if not program.variant.behind or not reads_attention(scorer):
        return {}
    layer = _scored_layer(program, region, scorer)
    name = "key" if layer is region else "previous_key"
    call = partial(program.call, before=region.nodes[0], subgraph=subgraphs.score)
    table, shown = program.placeholder_named("column_is_vision"), past_shown(program, layer)
    return {
        name: call(with_past, past_input(program, layer, 0), given[name]),
        "columns": call(columns_behind, shown, segment.columns, table),
    }


def _scoring_subgraph(region: Region) -> str:
    """Name the subgraph of a score, without what gathers its query rows under gradients: that has a backward then."""
    return f"score_{region.layer}"


def _moving_subgraph(program: Program, region: Region) -> str | None:
    """Name the subgraph of what chooses and moves tokens; under gradients it has a backward, and runs as it is."""
    return None if program.differentiable else f"prune_{region.layer}"
