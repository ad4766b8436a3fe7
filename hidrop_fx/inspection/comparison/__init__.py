"""Comparison of a compiled model with a reference, layer by layer."""
