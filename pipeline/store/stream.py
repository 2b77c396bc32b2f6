"""stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .batch import Batch, IndexArray, split
from .order import permuted
from .row_source import Rows


@dataclass
class RowStream(IterableDataset[Batch]):
    """Every row once per epoch, one after the other, for DataLoader: `DataLoader(RowStream(cache), batch_size=8, ...)`.

    The order is a function of `seed` and the epoch alone; ranks (`rank` of `world_size`) and DataLoader workers share it
    out, each row to exactly one of them. `epochs=None` never ends. Rows are decoded `block` at a time. Ranks may differ by
    one row per epoch: bound the steps by number, or give `drop_last`, which leaves out the rows that do not divide evenly.
    """

    source: Rows
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = 1
    first_epoch: int = 0
    """Set to n to continue after n epochs."""
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    block: int = 64

    def order(self, epoch: int, places: IndexArray | None = None) -> IndexArray:
        """The rows in these places of one epoch's order, by default in all of them; for all ranks and workers together."""
        rows = len(self.source)
        if places is None:
            places = np.arange(rows - rows % self.world_size if self.drop_last else rows)
        return permuted(places, rows, self.seed, epoch) if self.shuffle else places

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch = self.first_epoch
        while self.epochs is None or epoch < self.first_epoch + self.epochs:
            rows = len(self.source)
            if not rows:
                return
            stop = rows - rows % self.world_size if self.drop_last else rows
            mine = range(self.rank, stop, self.world_size)[worker_id::workers]
            for first in range(0, len(mine), self.block):
                yield from split(self.source.batch(self.order(epoch, np.asarray(mine[first : first + self.block]))))
            epoch += 1
