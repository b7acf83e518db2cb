"""A transformers tokenizer that carries the chat template."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megakor.instruct.template import chat_template


@pytest.fixture(scope="session")
def tokenizer_with_template() -> PreTrainedTokenizerFast:
    plain = Tokenizer(WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>", chat_template=chat_template())
