"""The calibration record, and its storage, tables and plot."""
