"""The order of samples: a pure function of (order version, seed, number of samples, position).

Position p of the endless stream belongs to epoch p // num_samples, and every epoch is a permutation of all samples.
The permutation is computed, not stored: a Feistel network keyed by (order version, seed, epoch) is a bijection on the
next power of four, and walking its cycles until the value falls below num_samples makes it one on the samples
(Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Any position is entered in O(1).

These numbers are part of every checkpoint's meaning: they may change only together with ORDER_VERSION.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER_VERSION = 1
NUM_ROUNDS = 8
MAX_SAMPLES = 2**62


def sample_ids(seed: int, num_samples: int, start: int, count: int) -> np.ndarray:
    """The samples at positions start … start + count - 1 of the endless stream: int64 [count].

    Each is in 0 … num_samples - 1. Costs O(count) time and memory, whatever num_samples and start are.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples={num_samples} must be in 1 … {MAX_SAMPLES}")
    if start < 0 or count < 0:
        raise ValueError(f"start={start} and count={count} must not be negative")
    first_epoch, first = divmod(start, num_samples)
    positions = np.arange(first, first + count, dtype=np.uint64)
    epochs, positions = np.divmod(positions, np.uint64(num_samples))
    num_epochs = int(epochs[-1]) + 1 if count else 0
    keys = [_round_keys(seed, first_epoch + epoch) for epoch in range(num_epochs)]
    return _permute(positions, num_samples, np.array(keys, dtype=np.uint64), epochs.astype(np.intp)).astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha512(f"megakor order {ORDER_VERSION} seed {seed} epoch {epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")  # [NUM_ROUNDS]


def _permute(values: np.ndarray, num_samples: int, keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """A bijection on 0 … num_samples - 1 by cycle walking; the domain is below 4 × num_samples, so walks are short.

    `keys` [epochs, NUM_ROUNDS]; `epochs` [values] says which row is a value's own.
    """
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys, epochs[outside])
        outside = outside[values[outside] >= num_samples]
    return values


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """A bijection on 0 … 4^half_bits - 1."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(NUM_ROUNDS):
        left, right = right, left ^ (_mix(right ^ keys[epochs, number]) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Stafford's mix 13): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
