"""Which rows a training step sees: a function of (seed, step) alone, whatever number of processes shares them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Sampler

Rows = np.ndarray[Any, np.dtype[np.int64]]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, as a DataLoader's `batch_sampler`.

    The permutations of all rows for (seed, epoch 0), (seed, epoch 1), ... follow each other without a gap, and step s takes
    the next `step_rows` of them: every row comes once before any comes again, no step is short, and a run that is resumed
    with another number of processes goes on where it was. The processes take equal parts of a step, `process_rows` at once
    at most.
    """

    def __init__(
        self, rows: int, step_rows: int, process_rows: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises ValueError for a step that the processes cannot share evenly, or where there are no rows."""
        if rows < 1:
            raise ValueError("there are no rows to train on")
        if step_rows % world_size:
            raise ValueError(f"a step of {step_rows} rows cannot be shared evenly by {world_size} processes")
        self._rows, self._step_rows, self._seed = rows, step_rows, seed
        self._share = step_rows // world_size
        self._first = rank * self._share
        self.micro_batches = -(-self._share // process_rows)
        """Per step and process."""
        self.steps_per_epoch = -(-rows // step_rows)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer's epochs are so many whole steps; the last one of each reaches into the next permutation."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            start = step * self._step_rows + self._first
            rows = rows_at(np.arange(start, start + self._share), self._rows, self._seed)
            for part in np.array_split(rows, self.micro_batches):
                yield part.tolist()


def rows_at(slots: Rows, rows: int, seed: int) -> Rows:
    """The rows in these places of the endless order, [n] -> [n]."""
    epochs, places = np.divmod(slots, rows)
    out = np.empty_like(slots)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        out[mine] = _permutation(rows, seed, int(epoch))[places[mine]]
    return out


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(rows)
