"""Records that an inspection is made of: layers, sums, bodies and executables."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One decoder layer, for one row of the last prompt."""

    layer: int
    region: str
    """Module path in the model."""
    segment: str
    """The token set that it sees: "start", "text", "inject 8", "prune 10", "exit 24"."""
    tokens: int
    """Tokens that it runs on, padding excluded."""
    vision_tokens: int
    """Vision tokens among them."""
    kv_length: int | None
    """Places that the prompt takes in its KV cache, for every row; None if there is no cache."""
    flops: int
    """Of this row, scoring included."""
    kv_bytes: int = 0
    """K and V of this row's tokens."""
    inserted: str = ""
    """Nodes that passes put before and into it, e.g. "prune 74, attention 1"."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all layers and all rows; `flops` and `kv_bytes` as `Costs` defines them."""

    token_layers: int
    flops: int
    kv_bytes: int
    """Of the prompt's own tokens: no padding, no room for new ones."""


@dataclass(frozen=True, kw_only=True)
class BodyReport:
    """A layer body, and the subgraphs of programs that share it."""

    name: str
    serves: str
    """E.g. "prefill layers 0-7, 24-31"."""


@dataclass(frozen=True, kw_only=True)
class ExecutableReport:
    """A program that can be called."""

    name: str
    """Purpose and variant, e.g. "prefill", "decode-masked"."""
    serves: str
    """The inputs it is for."""
    calls: int
    bodies: int
    """Compiled functions that it calls."""
    seconds: float
    """Spent compiling those; functions shared with another program count in both."""
    cuda_graph: str
    """"yes", or why not."""
