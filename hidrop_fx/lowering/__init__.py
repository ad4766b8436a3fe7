"""From a program to an executable: a short top graph over layer bodies that are compiled once."""
