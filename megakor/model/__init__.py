"""GPT-NeoX as plain PyTorch: blocks, their canonical parameter names and initial values, and the loss."""
