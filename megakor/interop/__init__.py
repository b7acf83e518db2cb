"""Exchange with other tools: Hugging Face's checkpoints and `tokenizer.json`, GPT-NeoX's configuration."""
