"""Tests, in folders as the product's: `tests/passes/test_inject.py` tests `passes/inject.py`."""
