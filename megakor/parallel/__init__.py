"""The layout of ranks, and the model cut to it."""
