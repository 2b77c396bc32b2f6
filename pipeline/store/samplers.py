"""Orders of rows as torch samplers: of a training in steps, and for any DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from ..base.places import RemotePath
from .arrays import RowIndices
from .order import Shuffle
from .prefetch import prefetched
from .row_source import RowSource
from .shard_order import WINDOW, ShardOrder


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, as a DataLoader's `batch_sampler`.

    The order is an endless sequence of epochs, and each step takes the next `step_rows` of it: no row repeats before
    every row has come, no step is short, and a run continues exactly with another number of processes. Processes have
    equal shares of a step, in micro-batches of at most `process_rows`.
    """

    def __init__(
        self,
        order: Shuffle | ShardOrder,
        step_rows: int,
        process_rows: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        source: RowSource | None = None,
    ) -> None:
        """`source`: fetch its shards ahead, in a `ShardOrder`.

        Raises ValueError for no rows, and for a step that does not divide among the processes.
        """
        if order.rows < 1:
            raise ValueError("there are no rows to train on")
        if step_rows % world_size:
            raise ValueError(f"a step of {step_rows} rows cannot be shared evenly by {world_size} processes")
        self._order, self._source = order, source
        self._step_rows, self._rank, self._world_size = step_rows, rank, world_size
        self.micro_batches = -(-(step_rows // world_size) // process_rows)
        """Per step and process."""
        self.steps_per_epoch = -(-order.rows // step_rows)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer's epochs are whole steps; the last step of each extends into the next permutation."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self.steps_per_epoch
        steps = range(first, first + self.steps_per_epoch)
        shares: Iterator[RowIndices] = (self._shares(step, 1)[0] for step in steps)
        if self._source is not None and isinstance(self._order, ShardOrder):
            windows = prefetched(self._source, self._windows(first, self._order))
            shares = (share for window in windows for share in window)
        for _, rows in zip(steps, shares, strict=False):
            for part in np.array_split(rows, self.micro_batches):
                yield part.tolist()

    def _shares(self, step: int, count: int) -> RowIndices:
        return self._order.shares(step, count, self._step_rows, self._rank, self._world_size)

    def _windows(self, step: int, order: ShardOrder) -> Iterator[RowIndices]:
        """[steps, rows] this process's shares of the steps that begin in each window, from `step` on."""
        for _, end in order.windows(step * self._step_rows):
            after = -(-end // self._step_rows)
            if after > step:
                yield self._shares(step, after - step)
                step = after


class EvaluationBatches(Sampler[list[int]]):
    """Every row once over all processes, in order, as a DataLoader's `batch_sampler`.

    All processes have the same number of batches, since sharded models compute together: one without rows left takes
    the first row again.
    """

    def __init__(self, rows: int, process_rows: int, *, rank: int = 0, world_size: int = 1) -> None:
        starts = range(
            rank * process_rows,
            -(-rows // (process_rows * world_size)) * process_rows * world_size,
            process_rows * world_size,
        )
        self._batches = [list(range(start, min(start + process_rows, rows))) for start in starts]

    @property
    def counted(self) -> list[bool]:
        """Whether each batch has rows of its own."""
        return [bool(batch) for batch in self._batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch or [0] for batch in self._batches])


class ShardShuffle(Sampler[int]):
    """An order for slow storage, as a DataLoader's `sampler`: every row once per epoch.

    Shards come in shuffled order, and the rows of `window` shards at a time are shuffled together: a function of `seed`
    and epoch alone, for any number of processes and loader workers. Each of `world_size` processes takes one row in
    `world_size`. The shards of a cache on an object store are fetched ahead in the background. Memory grows with the
    number of shards, not with that of rows.

        order = ShardShuffle(cache, seed=1)
        loader = DataLoader(cache, batch_size=8, sampler=order, collate_fn=collate)
        order.set_epoch(epoch)                  before each epoch
        order.state_dict(trained_rows)          to continue later, with any number of processes
    """

    def __init__(
        self, source: RowSource, *, seed: int = 0, window: int = WINDOW, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises ValueError for a window of no shard and for no rows."""
        self._source, self._order = source, ShardOrder(source.by_shard(), seed, window)
        if self._order.rows < 1:
            raise ValueError("there are no rows to read")
        self._rank, self._world_size = rank, world_size
        self._epoch, self._first, self._taken = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Continue with this epoch, from its first row, unless it is the one that `load_state_dict` has set."""
        if epoch != self._epoch:
            self._epoch, self._first, self._taken = epoch, 0, 0

    def __len__(self) -> int:
        """The rows that this process has left of the epoch."""
        return len(range(self._first + self._rank, self._order.rows, self._world_size))

    def __iter__(self) -> Iterator[int]:
        self._taken = self._first
        windows = prefetched(self._source, self._windows())
        rows = (row for window in windows for row in window.tolist())
        for row in islice(rows, len(self)):
            self._taken = min(self._taken + self._world_size, self._order.rows)
            yield row

    def _windows(self) -> Iterator[RowIndices]:
        """This process's rows of each window, from the place where it begins on into the next epochs."""
        total, epoch = self._order.rows, self._epoch
        for begin, end in self._order.windows(epoch * total + self._first):
            origin = begin // total * total + self._rank + (self._first if begin // total == epoch else 0)
            skipped = max(-(-(begin - origin) // self._world_size), 0)
            slots = np.arange(origin + skipped * self._world_size, end, self._world_size)
            if len(slots):
                yield self._order.rows_at(slots)

    def state_dict(self, trained_rows: int | None = None) -> dict[str, int]:
        """The place in the order after `trained_rows` rows of this epoch, of all processes together.

        None: after the rows that were handed out; a DataLoader with workers has taken more of them than it has
        returned.
        """
        return {"epoch": self._epoch, "rows": self._taken if trained_rows is None else trained_rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict`, also with another number of processes."""
        self._epoch, self._first = state["epoch"], state["rows"]
        self._taken = self._first


def training_order(source: RowSource, seed: int | None, window: int | None = None) -> Shuffle | ShardOrder:
    """The order of a training's rows: shuffled as a whole, or `window` shards at a time (`ShardOrder`).

    None: as a whole, but of caches on an object store 64 shards at a time. `seed` None: the rows as they stand.
    """
    if seed is None or (
        window is None and not any(isinstance(readers.cache, RemotePath) for readers in source.readers)
    ):
        return Shuffle(len(source), seed)
    return ShardOrder(source.by_shard(), seed, window or WINDOW)
