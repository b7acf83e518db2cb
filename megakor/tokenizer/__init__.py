"""Text to ids and back, without loss: the SentencePiece tokenizer, its special tokens and its training."""

from __future__ import annotations

from megakor.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
