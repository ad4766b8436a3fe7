"""What runs in place of a compiled model's forward."""
