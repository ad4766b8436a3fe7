"""Dumps: programs, plan and report as files."""
