"""Which sample is at which position: a pure function of (seed, sizes, weights), in constant memory.

Positions are cut into blocks of `BLOCK_DRAWS`. Every block holds each source exactly as often as its quota, in the
block's own order. The draws of one source go through its samples, in a new permutation each epoch. Nothing is stored
and nothing depends on the world size. So a position is one integer, and any position can be computed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from configs.errors import UserError

# Part of the order, so it must never change: another value would give every existing run other samples. Large enough
# that a source of weight 1/16384 still gets a draw, small enough that shares are exact over a few large batches.
BLOCK_DRAWS = 16_384

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64 bits in which each input bit moves half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def base_key(*parts: object) -> int:
    """64 bits from a hash over the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where each index of [0, size) goes, under the permutation that belongs to its key.

    index (N,) and key (N,) or (1,) uint64 -> (N,) uint64. An alternating Feistel network permutes the next power of
    two. A result beyond `size` passes through the network again until it is inside (cycle walking, fewer than two
    passes on average). The result is a permutation of [0, size).
    """
    bits = (size - 1).bit_length()
    out = _feistel(index, bits, key)
    outside = np.flatnonzero(out >= size)
    while len(outside):
        out[outside] = _feistel(out[outside], bits, key if len(key) == 1 else key[outside])
        outside = outside[out[outside] >= size]
    return out


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits - bits // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    high, low = x >> low_bits, x & low_mask
    for r in range(_ROUNDS):
        round_key = _mix(key + _GOLDEN * np.full(1, r + 1, np.uint64))
        if r % 2:
            high = high ^ (_mix(low + round_key) & high_mask)
        else:
            low = low ^ (_mix(high + round_key) & low_mask)
    return (high << low_bits) | low


def quotas(weights: Sequence[float], names: Sequence[str] | None = None, block: int = BLOCK_DRAWS) -> list[int]:
    """Draws of each source in a block: largest remainder, in exact arithmetic, ties to the earlier source.

    Raises UserError when a source would get none. It names the source and a weight that is enough.
    """
    shares = [Fraction(w) for w in weights]
    total = sum(shares)
    exact = [block * share / total for share in shares]
    quota = [int(e) for e in exact]
    by_remainder = sorted(range(len(quota)), key=lambda s: (quota[s] - exact[s], s))
    for s in by_remainder[: block - sum(quota)]:
        quota[s] += 1
    for s, draws in enumerate(quota):
        if draws == 0:
            name = names[s] if names else str(s)
            enough = float((total - shares[s]) / (block - 1))
            raise UserError(
                f"data.sources: the weight {weights[s]:g} of source {name!r} is too small to be drawn at all\n"
                f"remove the source, or give it a weight of at least {enough * 1.001:.4g}"
            )
    return quota


class Order:
    """The endless global order over several weighted sources.

    sizes: samples of each source (at least 1), weights: relative shares, seed: any integer.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], seed: int, names: Sequence[str] | None = None
    ) -> None:
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1:
            raise ValueError(f"every source needs a weight and at least one sample, got {sizes} and {weights}")
        self.sizes = list(sizes)
        self.quotas = quotas(weights, names)
        self.effective_weights = [q / BLOCK_DRAWS for q in self.quotas]
        self._first_slot = np.concatenate([[0], np.cumsum(self.quotas)])
        self._block_key = np.uint64(base_key("block", seed))
        self._source_keys = [np.uint64(base_key("source", seed, s)) for s in range(len(sizes))]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """positions (N,) int64, not negative -> (source index, sample index in the source, epoch), each (N,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        block, within = np.divmod(positions, BLOCK_DRAWS)
        slot = permute(within.astype(np.uint64), BLOCK_DRAWS, _mix(block.astype(np.uint64) + self._block_key))
        slot = slot.astype(np.int64)
        source = np.searchsorted(self._first_slot, slot, side="right") - 1
        sample, epoch = np.empty_like(positions), np.empty_like(positions)
        for s, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == s)
            draw = block[mine] * self.quotas[s] + slot[mine] - self._first_slot[s]
            epoch[mine], index = np.divmod(draw, size)
            key = _mix(epoch[mine].astype(np.uint64) + self._source_keys[s])
            sample[mine] = permute(index.astype(np.uint64), size, key).astype(np.int64)
        return source, sample, epoch
