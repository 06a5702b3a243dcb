"""A pseudo-random order of any number of records, in constant memory."""

import hashlib

import numpy as np

FEISTEL_ROUNDS = 4  # Luby and Rackoff 1988: four rounds give a strong pseudo-random permutation
_SPLITMIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map `values` (int64, 0 <= v < size) through pseudo-random permutations of range(size), one key each.

    A Feistel network over the next even power of two, repeated until it lands below `size` (cycle walking, Black
    and Rogaway 2002): constant time and memory for any size, where a shuffled list of 100 million takes both.
    """
    if size <= 1:
        return np.zeros_like(values)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    rounds = [mix(keys + np.uint64(i)) for i in range(FEISTEL_ROUNDS)]
    out = values.astype(np.uint64)
    outside = np.arange(out.size)
    while outside.size:
        v = out[outside]
        left, right = v >> half_bits, v & mask
        for key in rounds:
            left, right = right, left ^ (mix(right ^ key[outside]) & mask)
        v = (left << half_bits) | right
        out[outside] = v
        outside = outside[v >= size]
    return out.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on a uint64 array, which wraps silently."""
    x = x + _SPLITMIX[0]
    x = (x ^ (x >> np.uint64(30))) * _SPLITMIX[1]
    x = (x ^ (x >> np.uint64(27))) * _SPLITMIX[2]
    return x ^ (x >> np.uint64(31))


def key_of(*parts: object) -> np.uint64:
    """A number that follows from these parts alone, on any machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
