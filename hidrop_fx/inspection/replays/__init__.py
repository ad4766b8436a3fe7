"""Replays of dumped programs, stage by stage."""
