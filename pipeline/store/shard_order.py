"""A shuffled order for slow storage: shards in shuffled order, rows shuffled among some shards at a time.

The shards are shuffled, each `window` of them are a *window*, and the rows of a window are shuffled together. Whoever
follows the order reads a window after the other and needs the next one only when this one ends. The order is a function
of seed and epoch alone. Memory grows with the number of shards, by 40 bytes for each, and not with that of rows. Where
there is one window only, it is the order of `Shuffle`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arrays import RowIndices
from .order import permuted

SHARD_BYTES = 40
"""Memory of a shard in the order: its place, size and cache, twice where the order of an epoch needs them."""
WINDOW = 64
"""Shards of a window: 16 GB of large ones. Of two rows of a batch one pair in 64 is then from the same shard."""


@dataclass(frozen=True)
class RowsByShard:
    """The rows of a source, shard after shard."""

    sizes: RowIndices
    """[shards] rows in each shard that has any."""
    caches: RowIndices
    """[shards] the cache that the shard belongs to, by number."""
    rows: RowIndices | None = None
    """[rows] the rows shard after shard; None where they are numbered so."""


class _Epoch(NamedTuple):
    order: RowIndices
    """[shards]"""
    ends: RowIndices
    """[shards] the place behind the last row of each, before the shuffle."""
    window_ends: RowIndices
    """[windows] the place behind the last row of each."""


class ShardOrder:
    """An endless sequence of rows, an epoch of all of them after the other."""

    def __init__(self, shards: RowsByShard, seed: int, window: int = WINDOW) -> None:
        """Raises ValueError for a window of no shard."""
        if window < 1:
            raise ValueError(f"a window of {window} shards: it has at least one")
        self._shards, self._seed, self._window = shards, seed, window
        self.rows = int(shards.sizes.sum())
        self._firsts = np.cumsum(shards.sizes) - shards.sizes
        self._epochs: dict[int, _Epoch] = {}

    def rows_at(self, slots: RowIndices) -> RowIndices:
        """Places in the sequence -> rows, of the same shape [B]."""
        return self._located(slots)[1]

    def shares(self, first: int, count: int, step_rows: int, rank: int, world_size: int) -> RowIndices:
        """[count, step_rows / world_size] the part of one process of `count` steps from `first` on -> rows.

        Processes divide the rows of a step by shards, so that each needs about its share of the shards of a window.
        """
        shards, rows = self._located(np.arange(first * step_rows, (first + count) * step_rows))
        if world_size == 1:
            return rows.reshape(count, step_rows)
        part = step_rows // world_size
        by_shard = np.argsort(shards.reshape(count, step_rows), axis=1, kind="stable")
        mine = np.sort(by_shard[:, rank * part : (rank + 1) * part], axis=1)
        return np.take_along_axis(rows.reshape(count, step_rows), mine, 1)

    def windows(self, slot: int) -> Iterator[tuple[int, int]]:
        """[first, last + 1) place of every window from that of `slot` on, without end; the first begins at `slot`."""
        while True:
            epoch, place = divmod(slot, self.rows)
            ends = self._epoch(epoch).window_ends
            for end in ends[np.searchsorted(ends, place, side="right") :].tolist():
                yield slot, epoch * self.rows + end
                slot = epoch * self.rows + end

    def _located(self, slots: RowIndices) -> tuple[RowIndices, RowIndices]:
        """Places [B] -> number of each row's shard in the sequence of shards, and row [B]."""
        epochs, places = np.divmod(slots, self.rows)
        shards, rows = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            at, rows[mine] = self._in_epoch(epoch, places[mine])
            shards[mine] = at + epoch * len(self._firsts)
        return shards, rows

    def _in_epoch(self, epoch: int, places: RowIndices) -> tuple[RowIndices, RowIndices]:
        order, ends, window_ends = self._epoch(epoch)
        if len(window_ends) == 1:
            return np.zeros_like(places), permuted(places, self.rows, self._seed, epoch)
        windows = np.searchsorted(window_ends, places, side="right")
        shuffled = np.empty_like(places)
        for window in np.unique(windows).tolist():
            mine, begin = windows == window, int(window_ends[window - 1]) if window else 0
            size = int(window_ends[window]) - begin
            shuffled[mine] = begin + permuted(places[mine] - begin, size, self._seed, epoch, window + 1)
        at = np.searchsorted(ends, shuffled, side="right")
        shards = order[at]
        rows = self._firsts[shards] + shuffled - (ends[at] - self._shards.sizes[shards])
        return at, rows if self._shards.rows is None else self._shards.rows[rows]

    def _epoch(self, epoch: int) -> _Epoch:
        """The shards of an epoch in their order.

        Where there are several caches, each one's shards are spread evenly, so that every window has its share of them.
        """
        if epoch in self._epochs:
            return self._epochs[epoch]
        count = len(self._firsts)
        order = permuted(np.arange(count), count, self._seed, epoch)
        caches, numbers, sizes = np.unique(self._shards.caches, return_inverse=True, return_counts=True)
        if len(caches) > 1:
            cache_of = numbers[order]
            by_cache = np.argsort(cache_of, kind="stable")
            nth = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            # The nth of a cache's shards lies at (n + 1/2) / their number of the whole.
            at = (nth + 0.5) / np.repeat(sizes, sizes)
            order = order[by_cache][np.argsort(at, kind="stable")]
        ends = np.cumsum(self._shards.sizes[order])
        whole = ends[self._window - 1 :: self._window]
        found = _Epoch(order, ends, whole if count % self._window == 0 else np.append(whole, ends[-1]))
        # A step, or the look ahead, may reach into the next epoch.
        self._epochs = {near: kept for near, kept in self._epochs.items() if abs(near - epoch) == 1} | {epoch: found}
        return found
