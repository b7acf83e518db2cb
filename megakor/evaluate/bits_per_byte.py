"""Bits per byte: what a model needs to say a held-out text, and what two simple models need for the same.

Bits per byte does not depend on the tokenizer, so that runs with different vocabularies compare. Every token of the
set counts, end-of-document tokens too; the bytes are the text's own.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from megakor.checkpoint.reader import load_model, resolve, run_of
from megakor.config.schema import EvaluateConfig
from megakor.data.cache import ShardCache
from megakor.data.heldout import HeldoutSet
from megakor.data.prefetch import Prefetcher
from megakor.data.source import Source
from megakor.logs import progress
from megakor.model.documents import Borders
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.loss import token_losses
from megakor.tokenizer.tokenizer import Tokenizer

SMOOTHING = tuple(2.0**power for power in range(-10, 5))


@torch.no_grad()
def model_bits(model: GPTNeoXForCausalLM, heldout: HeldoutSet, num_tokens: int, micro_batch_size: int) -> float:
    """Bits that the model needs for the whole set."""
    nats = 0.0
    for start in progress(range(0, heldout.num_windows, micro_batch_size), unit="batch", description=heldout.name):
        batch = heldout.windows(start, micro_batch_size)
        if batch.documents is not None:
            model.parts.documents.start([Borders.of(torch.from_numpy(batch.documents))])
        losses = token_losses(model(torch.from_numpy(batch.input_ids)), torch.from_numpy(batch.labels), num_tokens)
        nats += float((losses * torch.from_numpy(batch.loss_mask)).sum(dtype=torch.float64))
    return nats / math.log(2)


def unigram_bits(train: Source, heldout: Source, num_tokens: int) -> float:
    """Bits that token frequencies alone need for the held-out tokens: a unigram model with additive smoothing.

    Frequencies are the training set's; the smoothing constant is the one, of powers of two, that serves the held-out
    set best, so that the figure to beat is the lowest that such a model can reach.
    """
    counts = np.bincount(train.read(0, train.num_tokens), minlength=num_tokens).astype(np.float64)
    tokens = heldout.read(0, heldout.num_tokens)

    def bits(alpha: float) -> float:
        return float(-np.log2((counts[tokens] + alpha) / (counts.sum() + alpha * num_tokens)).sum())

    return min(bits(alpha) for alpha in SMOOTHING)


def order0_bits(heldout: Source, tokenizer: Tokenizer) -> float:
    """Bits at the held-out text's own byte frequencies, an entropy that no order-0 byte model can go below."""
    tokens = heldout.read(0, heldout.num_tokens)
    counts: Counter[int] = Counter()
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eod_id) + 1):
        counts.update(tokenizer.decode([int(token) for token in document if token != tokenizer.eod_id]).encode())
    total = sum(counts.values())
    return -sum(count * math.log2(count / total) for count in counts.values())


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Bits per byte of a checkpoint, of a unigram model (where training shards are given) and of an order-0 model.

    Documents are kept apart where the checkpoint was trained so.

    Raises:
        ValueError: the shards were made with another tokenizer than the checkpoint's.
    """
    checkpoint = resolve(config.run)
    model, manifest = load_model(checkpoint)
    tokenizer = Tokenizer.load(run_of(checkpoint) / "tokenizer")
    sequence_length = manifest.model["max_position_embeddings"]  # as far as an imported model goes
    if not manifest.weights_alone:
        sequence_length = manifest.train["train"]["sequence_length"]
    separate = manifest.train.get("data", {}).get("separate_documents", False)
    files = None if config.cache is None else Prefetcher(ShardCache(config.cache, config.cache_size, "cache_size"))
    heldout = HeldoutSet("heldout", config.heldout, sequence_length, files, separate)
    heldout.tokens.manifest.check_tokenizer(manifest.tokenizer_fingerprint, f"run={config.run}")
    size = heldout.num_text_bytes
    bits = model_bits(model, heldout, manifest.num_tokens, config.micro_batch_size)
    figures: dict[str, Any] = {
        "step": manifest.step,
        "tokens": heldout.num_tokens,
        "bytes": size,
        "loss": bits * math.log(2) / heldout.num_tokens,
        "bits_per_byte": bits / size,
        "order0_bits_per_byte": order0_bits(heldout.tokens, tokenizer) / size,
    }
    if config.train is not None:
        train = Source(config.train, files)
        train.manifest.check_tokenizer(manifest.tokenizer_fingerprint, f"run={config.run}")
        figures["unigram_bits_per_byte"] = unigram_bits(train, heldout.tokens, manifest.num_tokens) / size
    return figures
