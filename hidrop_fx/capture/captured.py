"""A captured decoder, as data: the graph, and what is known of it once it was traced."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from hidrop_fx.capture.placement import Placement
from hidrop_fx.capture.tensor_parallel import Processes
from hidrop_fx.planning.deepstack import Deepstack


@dataclass(frozen=True, kw_only=True)
class CapturedDecoder:
    """A decoder as a graph from embeddings to normalised hidden states.

    Placeholders are `inputs_embeds` [B, S, D], `position_ids` [B, S] or [axes, B, S] and one boolean mask
    [B, 1, S, S] per name in `masks`.
    """

    module: fx.GraphModule
    layers: str
    """Module path of the list of decoder layers, e.g. "layers"."""
    num_layers: int
    masks: tuple[str, ...]
    static_sizes: frozenset[int]
    """Sizes of the decoder's parameters and of the values in its graph, batch and length aside."""
    seconds: float
    custom_backwards: Mapping[str, str] = field(default_factory=dict)
    """Of functions with a backward of their own, which the graph lacks: their names, and the module of each."""
    deepstack: Deepstack | None = None
    """Where features are added to vision tokens, which the graph, traced without images, does not do."""
    sharded: bool = False
    """Its parameters stand for those that FSDP2 shards: each is looked up while its module's call gathers it."""
    processes: Processes | None = None
    """Those of tensor parallelism, which divide its heads and channels; None where each has all."""
    placement: Placement | None = None
    """Where it computes, if that is not one device. Parameters of an offloaded one are stand-ins, as of a sharded one."""
    tokenwise: frozenset[int] = frozenset()
    """Layers whose tokens see no others, by their type in the config."""
    ends_gradients: tuple[str, ...] = ()
    """Modules that compute under `torch.no_grad`, which the graph does not."""

    @property
    def stands_in(self) -> bool:
        """True if its parameters are stand-ins: each is looked up while its module is called."""
        return self.sharded or (self.placement is not None and self.placement.offloaded)

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.module.graph.nodes if n.op == "placeholder"}
