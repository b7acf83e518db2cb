"""Exchange with other tools: checkpoints as Hugging Face folders, SentencePiece models as `tokenizer.json`."""

from __future__ import annotations

from megakor.interop.adapters import export_adapters
from megakor.interop.huggingface import export
from megakor.interop.self_check import self_check
from megakor.interop.tokenizer_json import build_tokenizer

__all__ = ["build_tokenizer", "export", "export_adapters", "self_check"]
