"""The plain loop over a model's own layers, which programs are held against."""
