"""Trials of schedules on samples."""
