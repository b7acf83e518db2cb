"""Exchange with other tools: Hugging Face's models, out and in, and `tokenizer.json`, GPT-NeoX's configuration."""
