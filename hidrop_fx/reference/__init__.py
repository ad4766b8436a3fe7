"""What a schedule means, run the plain way: a loop over the model's own layers."""
