"""Order the passes that make a program; custom passes."""
