"""What the first call for a prompt returns: rows at the places that were asked for, and a cache that knows its tokens.

output = prompt_output(prepared, context, outputs)      # outputs of the program, by name
"""

from torch import Tensor

from hidrop_fx.lowering.executable import Executable
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.program.outputs import columns_output, keys_output, states_output, values_output
from hidrop_fx.program.program import Program
from hidrop_fx.runtime.call_context import PromptContext
from hidrop_fx.runtime.output import DecoderOutput
from hidrop_fx.runtime.packing import Packing
from hidrop_fx.runtime.prepared_call import PreparedCall


def prompt_output(
    prepared: PreparedCall, context: PromptContext, outputs: dict[str, Tensor]
) -> DecoderOutput:
    """Note in the cache which tokens survived, and return the rows that the call asked for."""
    program, layout = prepared.executable.program, context.layout
    columns = _columns(program, outputs)
    if context.real is not None and prepared.cache is not None:
        prepared.cache.log.join(columns, layout, context.real, context.prompt.kinds)
    elif prepared.cache is not None:
        prepared.cache.log.note_columns(columns, layout.columns)
        if prepared.variant.differentiable:
            prepared.cache.link(linked_outputs(program, outputs))
    hidden, hidden_states = outputs["hidden"], None
    if prepared.variant.output == "all":
        full = scatter_rows(hidden, columns[program.segments[-1].name], layout.columns)
        given = context.prompt.as_given
        hidden = given(full) if context.rows == "all" else _chosen_rows(full, context)
        if context.states:
            states = (*_between_layers(prepared.executable, outputs, layout), full)
            hidden_states = tuple(map(given, states))
    chosen = _given_columns(context) if context.rows == "text" else None
    if context.packing is not None:
        hidden, chosen = _packed(context.packing, context, hidden)
        if hidden_states is not None:
            hidden_states = tuple(map(context.packing.together, hidden_states))
    return DecoderOutput(
        hidden=hidden,
        columns=chosen,
        cache=prepared.cache,
        features=_by_kind(context, outputs.get("features", context.features)),
        hidden_states=hidden_states,
        extras={name: outputs[name] for name in program.extras},
    )


def _by_kind(context: PromptContext, features: Tensor | None) -> dict[str, Tensor]:
    """Return the features [tokens, D] of each kind that a prompt has, by its name."""
    if features is None:
        return {}
    if len(context.kinds) == 1:
        return {context.kinds[0]: features}
    parts = zip(context.kinds, features.split(context.feature_lengths), strict=True)
    return {name: part for name, part in parts if len(part)}


def _columns(program: Program, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns [B, S] of each segment and tail, by its name, and those [B, G, n] of what cut caches keep."""
    cuts = [cut.name for cut in program.plan.cuts] if program.cuts else []
    names = [*(segment.name for segment in program.segments), *cuts, *program.tails]
    return {name: outputs[columns_output(name)] for name in names}


def _packed(
    packing: Packing, context: PromptContext, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the rows [B, R, D] that the call asked for in its own rows, and their columns where they are the text's."""
    if context.rows == "all":
        return packing.together(hidden), None
    if context.rows == "last":
        return packing.last(hidden), None
    room, columns = context.prompt.room, context.layout.text_columns
    columns = columns if room is None else room.given(columns)
    return packing.chosen(hidden, columns, context.prompt.length)


def _given_columns(context: PromptContext) -> Tensor:
    """Return the columns [B, T] of the text stream in the prompt as it was given."""
    room = context.prompt.room
    return context.text_columns if room is None else room.given(context.text_columns)


def _chosen_rows(full: Tensor, context: PromptContext) -> Tensor:
    """Return the rows that the call chose, of a program that returns all rows [B, L, D]."""
    index = context.output_columns.to(full.device).clamp(max=full.shape[1] - 1)
    return full.gather(1, index[:, :, None].expand(-1, -1, full.shape[2]))


def _between_layers(
    executable: Executable, outputs: dict[str, Tensor], layout: Layout
) -> list[Tensor]:
    """Return the first layer's input, and the outputs of all but the last, at the columns of the prompt."""
    found = []
    for index in range(len(executable.program.regions)):
        segment = executable.program.segment_of(max(0, index - 1)).name
        states = outputs[states_output(index)]
        found.append(scatter_rows(states, outputs[columns_output(segment)], layout.columns))
    return found


def linked_outputs(program: Program, outputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [B, G, S, d] of each layer, of a program that is differentiable through the cache."""
    both = sum(region.attends and region.keeps_state for region in program.regions)
    entries = range(len(program.regions) + both)
    nothing = outputs["hidden"].new_zeros(1, 0, 1, 0)  # of layers whose tokens see no others
    return [
        (outputs.get(keys_output(k), nothing), outputs.get(values_output(k), nothing))
        for k in entries
    ]


def scatter_rows(hidden: Tensor, columns: Tensor, length: int) -> Tensor:
    """Put rows [B, S, D] back at their columns -> [B, L, D], zero elsewhere."""
    full = hidden.new_zeros(len(hidden), length + 1, hidden.shape[2])
    index = columns.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[2])
    return full.scatter(1, index, hidden)[:, :length]
