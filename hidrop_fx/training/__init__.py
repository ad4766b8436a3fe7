"""What training adds to a program: loss rows, learned ratios, recomputation, and where they are saved."""
