"""An iterable dataset over any source of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .arrays import RowIndices
from .batch import Batch, unbatch
from .order import permuted
from .row_source import RowSource


@dataclass
class RowStream(IterableDataset[Batch]):
    """Every row once per epoch, for DataLoader: `DataLoader(RowStream(cache), batch_size=8, ...)`.

    The order is a function of `seed` and the epoch alone. Each row goes to exactly one rank (`rank` of `world_size`)
    and one DataLoader worker. `epochs=None` never ends. Rows are decoded `block` at a time. Ranks may differ by one row
    per epoch: limit the number of steps, or set `drop_last`, which omits the rows that do not divide evenly.
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

    def order(self, epoch: int, places: RowIndices | None = None) -> RowIndices:
        """Places in one epoch's order, by default all, -> rows; the order is common to all ranks and workers."""
        places = np.arange(self._stop) if places is None else places
        return permuted(places, len(self.source), self.seed, epoch) if self.shuffle else places

    @property
    def _stop(self) -> int:
        rows = len(self.source)
        return rows - rows % self.world_size if self.drop_last else rows

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        own = range(self.rank, self._stop, self.world_size)[worker_id::workers]
        first_epoch = self.first_epoch
        epochs = count(first_epoch) if self.epochs is None else range(first_epoch, first_epoch + self.epochs)
        for epoch in epochs if own else ():
            for first in range(0, len(own), self.block):
                yield from unbatch(self.source.batch(self.order(epoch, np.asarray(own[first : first + self.block]))))
