"""A compiled model compared with a reference, layer by layer."""
