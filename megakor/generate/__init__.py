"""Text from a checkpoint: continuations of a prompt and answers to a question."""
