"""Measurements of the full model by layer, and sweeps over exit and injection layers."""
