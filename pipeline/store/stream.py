"""An iterable dataset over any source of rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .arrays import RowIndices
from .batch import Batch, unbatch
from .prefetch import prefetched
from .row_source import RowSource
from .samplers import training_order
from .shard_order import ShardOrder


@dataclass
class RowStream(IterableDataset[Batch]):
    """Every row once per epoch, for DataLoader: `DataLoader(RowStream(cache), batch_size=8, ...)`.

    The order is a function of `seed`, `window` and the epoch alone. Each row goes to exactly one rank (`rank` of
    `world_size`) and one DataLoader worker. `epochs=None` never ends. Rows are decoded `block` at a time. Ranks may
    differ by one row per epoch: limit the number of steps, or set `drop_last`, which omits the rows that do not divide
    evenly.

    With a `window`, shards come in shuffled order, the rows of so many of them are shuffled together, and those of a
    cache on an object store are fetched ahead, as by `ShardShuffle`.
    """

    source: RowSource
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = 1
    first_epoch: int = 0
    """The number of epochs already done, to continue from."""
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    block: int = 64
    window: int | None = None
    """None: all rows are shuffled together, those of caches on an object store 64 shards at a time."""

    def __post_init__(self) -> None:
        """Raises ValueError for a window of no shard."""
        self._order = training_order(self.source, self.seed if self.shuffle else None, self.window)

    def order(self, epoch: int, places: RowIndices | None = None) -> RowIndices:
        """Places in one epoch's order, by default all, -> rows; the order is common to all ranks and workers."""
        places = np.arange(self._stop) if places is None else places
        return self._order.rows_at(epoch * len(self.source) + places)

    @property
    def _stop(self) -> int:
        rows = len(self.source)
        return rows - rows % self.world_size if self.drop_last else rows

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        own = range(self.rank, self._stop, self.world_size)[worker_id::workers]
        first_epoch = self.first_epoch
        every = count(first_epoch) if self.epochs is None else range(first_epoch, first_epoch + self.epochs)
        epochs: Iterable[int] = every if own else ()
        if isinstance(self._order, ShardOrder):
            pieces = prefetched(self.source, self._windows(self._order, own, epochs)) if own else iter(())
        else:
            pieces = (self.order(epoch, np.asarray(part)) for epoch in epochs for part in _blocks(own, self.block))
        for piece in pieces:
            for rows in _blocks(piece, self.block):
                yield from unbatch(self.source.batch(rows))

    def _windows(self, order: ShardOrder, own: range, epochs: Iterable[int]) -> Iterator[RowIndices]:
        """The rows of each window at the `own` places of each epoch."""
        for epoch in epochs:
            first = epoch * order.rows
            for begin, end in order.windows(first):
                mine = own[bisect_left(own, begin - first) : bisect_left(own, end - first)]
                if mine:
                    yield self.order(epoch, np.asarray(mine))
                if end - first == order.rows:
                    break


B = TypeVar("B", range, RowIndices)


def _blocks(rows: B, size: int) -> Iterator[B]:
    return (rows[first : first + size] for first in range(0, len(rows), size))
