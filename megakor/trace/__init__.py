"""What a run has read, and when."""
