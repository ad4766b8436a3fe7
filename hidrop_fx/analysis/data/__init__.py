"""Calibration samples: records on disk, and batches checked and encoded once."""
