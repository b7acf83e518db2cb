"""What a run needs before it runs: from a configuration and data sheets to memory, time and cost. Nothing loads PyTorch."""
