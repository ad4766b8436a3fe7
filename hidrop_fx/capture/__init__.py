"""Capture a Hugging Face text decoder as one graph, and find its layers in it."""
