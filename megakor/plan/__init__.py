"""What a run will need, before it runs: memory, time and cost, from a configuration alone. PyTorch is never loaded."""
