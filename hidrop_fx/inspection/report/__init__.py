"""Reports: what a compiled model did in its last call, and what a call would do."""
