"""Permutations that are computed, not stored: any value of any of them costs the same, whatever their size.

A Feistel network keyed by what the permutation belongs to is a bijection on the next power of four, and walking its
cycles until the value falls below the size makes it one on 0 … size - 1 (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). The next power of four is below 4 × size, so walks are short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

NUM_ROUNDS = 8
MAX_SIZE = 2**62
SHIFTS = tuple(map(np.uint64, (30, 27, 31)))
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def root_keys(text: str) -> np.ndarray:
    """The round keys of a text: uint64 [NUM_ROUNDS]."""
    return np.frombuffer(hashlib.sha512(text.encode()).digest(), dtype="<u8").astype(np.uint64)


def child_keys(keys: np.ndarray, *numbers: np.ndarray) -> np.ndarray:
    """Round keys of the children of a root by their numbers, int64 [n] each: uint64 [n, NUM_ROUNDS]."""
    for number in numbers:
        keys = _mix(keys + _mix(number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))[:, None])
    return keys


def permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each value goes in a permutation of its own: int64 [n].

    Args:
        values: [n], each in 0 … its size - 1.
        sizes: [n] of the permutations, at most `MAX_SIZE`.
        keys: [n, NUM_ROUNDS] or [1, NUM_ROUNDS] of the permutations.
    """
    return _walk(_feistel, values, sizes, keys)


def unpermute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What `permute` sends to each value: int64 [n]."""
    return _walk(_inverse_feistel, values, sizes, keys)


def permutation(size: int, keys: np.ndarray) -> np.ndarray:
    """The whole permutation: int64 [size]."""
    return permute(np.arange(size), np.array(size), keys[None])


def _walk(bijection: Callable, values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Apply a bijection on the next power of four until each value is below its size."""
    values, sizes = values.astype(np.uint64), np.broadcast_to(sizes, values.shape).astype(np.uint64)
    keys = np.broadcast_to(keys, (len(values), NUM_ROUNDS))
    half_bits = np.maximum(1, (_bit_length(sizes - np.uint64(1)) + 1) // 2).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = bijection(values[outside], half_bits[outside], keys[outside])
        outside = outside[values[outside] >= sizes[outside]]
    return values.astype(np.int64)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """Bits of each value up to 2^62: int64 [n]."""
    high = values >> np.uint64(31)  # frexp is exact up to 53 bits
    bits = np.frexp(np.where(high > 0, high, values).astype(np.float64))[1].astype(np.int64)
    return np.where(high > 0, bits + 31, bits)


def _feistel(values: np.ndarray, half_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A bijection on 0 … 4^half_bits - 1 for each value."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for number in range(NUM_ROUNDS):
        left, right = right, left ^ (_mix(right ^ keys[:, number]) & mask)
    return (left << half_bits) | right


def _inverse_feistel(values: np.ndarray, half_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for number in reversed(range(NUM_ROUNDS)):
        left, right = right ^ (_mix(left ^ keys[:, number]) & mask), left
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Stafford's mix 13): every input bit moves every output bit."""
    shift, *shifts = SHIFTS
    values = values ^ (values >> shift)
    for factor, shift in zip(FACTORS, shifts, strict=True):  # in place: arrays are small, and new ones cost most
        values *= factor
        values ^= values >> shift
    return values
