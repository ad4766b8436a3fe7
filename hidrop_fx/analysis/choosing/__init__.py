"""Choice of layers and of the largest pyramid inside a budget."""
