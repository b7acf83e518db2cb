"""What a run needs of its machines, found out before the model is built."""
