"""The graph under rewriting: inputs, token sets, history, and its form as Python."""
