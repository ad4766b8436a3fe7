"""Local search around a schedule."""
