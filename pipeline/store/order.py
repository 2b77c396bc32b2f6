"""Shuffled orders of rows, computed place by place and never stored: a billion rows need no more memory than ten."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import RowIndices

Bits = np.ndarray[Any, np.dtype[np.uint64]]


class Shuffle:
    """An endless sequence of rows: the permutations of all of them for (seed, epoch 0), (seed, epoch 1), ..."""

    def __init__(self, rows: int, seed: int | None) -> None:
        """`seed` None: every permutation is the rows as they stand."""
        self.rows, self._seed = rows, seed

    def rows_at(self, slots: RowIndices) -> RowIndices:
        """Places in the sequence -> rows, of the same shape [B]."""
        return rows_at(slots, self.rows, self._seed)

    def shares(self, first: int, count: int, step_rows: int, rank: int, world_size: int) -> RowIndices:
        """[count, step_rows / world_size] the part of one process of `count` steps from `first` on -> rows."""
        part = step_rows // world_size
        steps = np.arange(first, first + count)[:, None] * step_rows
        return self.rows_at(steps + np.arange(rank * part, (rank + 1) * part))


def rows_at(slots: RowIndices, rows: int, seed: int | None) -> RowIndices:
    """Places in the endless sequence -> rows, of the same shape [B]."""
    epochs, places = np.divmod(slots, rows)
    if seed is None:
        return places
    out = np.empty_like(slots)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        out[mine] = permuted(places[mine], rows, seed, int(epoch))
    return out


def permuted(places: RowIndices, rows: int, seed: int, epoch: int, part: int = 0) -> RowIndices:
    """Places [B] of a random permutation of `rows` rows -> the rows at these places [B].

    Parts of an epoch have permutations of their own.

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of as many bits as `rows` needs; a result outside the
    rows is permuted again until it is inside, which remains a permutation (Black & Rogaway 2002, section 3, cycle
    walking).
    """
    bits = max((rows - 1).bit_length(), 1)
    keys = np.random.SeedSequence([seed, epoch, part]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    out = _feistel(places.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(out >= rows)).size:
        out[outside] = _feistel(out[outside], bits, keys)
    return out.astype(np.int64)


_ROUNDS = 8


def _feistel(x: Bits, bits: int, keys: Bits) -> Bits:
    """A permutation of the numbers below 2^bits: a hash of each half changes the other half, in turn."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    high, low = x >> low_bits, x & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_hash(high ^ key) & low_mask)
        else:
            high = high ^ (_hash(low ^ key) & high_mask)
    return (high << low_bits) | low


def _hash(x: Bits) -> Bits:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014); products overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
