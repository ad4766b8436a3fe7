"""Which passes make a program, in which order; passes of the user."""
