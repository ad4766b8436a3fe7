"""Executables on static buffers, recorded once a set of shapes and replayed."""
