"""Names of what programs return beside "hidden": given by the head pass, read by the runtime."""

COLUMNS = "columns_"
RESERVED = (COLUMNS, "states_", "layer_", "features", "cached_")
"""Beginnings of names that custom passes may not return."""


def columns_output(segment: str) -> str:
    """Return the name of the columns [B, S] of a segment's tokens."""
    return f"{COLUMNS}{segment}"


def keys_output(layer: int) -> str:
    """Return the name of the keys [B, G, S, d] of a layer, in a program that is differentiable through the cache."""
    return f"cached_keys_{layer}"


def values_output(layer: int) -> str:
    """Return the name of the values [B, G, S, d] of a layer, likewise."""
    return f"cached_values_{layer}"


def states_output(layer: int) -> str:
    """Return the name of the hidden states [B, S, D] that a layer reads."""
    return f"states_{layer}"
