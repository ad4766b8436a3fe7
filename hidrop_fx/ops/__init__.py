"""Plain tensor functions, called by the graphs and by the eager loop alike."""
