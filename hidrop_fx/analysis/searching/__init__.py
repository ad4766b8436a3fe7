"""Trials of schedules on samples, and local search among them."""
