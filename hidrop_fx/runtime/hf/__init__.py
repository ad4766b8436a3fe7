"""Where a compiled model meets transformers: forward, generate, saving, the Trainer."""
