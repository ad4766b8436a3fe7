"""Training: labels of the rows that reach the head, learned pruning ratios, and the files that keep them."""
