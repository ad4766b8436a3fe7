"""Calls of a compiled model: prepared, run, and turned into the outputs that transformers expects."""
