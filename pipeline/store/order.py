"""The rows of each training step: a function of seed and step alone, for any number of processes.

A shuffled order is computed place by place and never stored: a billion rows need no more memory than ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .arrays import RowIndices

Bits = np.ndarray[Any, np.dtype[np.uint64]]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, as a DataLoader's `batch_sampler`.

    The permutations of all rows for (seed, epoch 0), (seed, epoch 1), ... form one endless sequence, and each step
    takes the next `step_rows` of it: no row repeats before every row has come, no step is short, and a run continues
    exactly with another number of processes. Processes have equal shares of a step, in micro-batches of at most
    `process_rows`.
    """

    def __init__(
        self, rows: int, step_rows: int, process_rows: int, *, seed: int | None, rank: int = 0, world_size: int = 1
    ) -> None:
        """`seed` None: every permutation is the rows as they stand.

        Raises ValueError for no rows, and for a step that does not divide among the processes.
        """
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
        """Trainer's epochs are whole steps; the last step of each extends into the next permutation."""
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


def permuted(places: RowIndices, rows: int, seed: int, epoch: int) -> RowIndices:
    """Places [B] of a random permutation of `rows` rows -> the rows at these places [B].

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of as many bits as `rows` needs; a result outside the
    rows is permuted again until it is inside, which remains a permutation (Black & Rogaway 2002, section 3, cycle
    walking).
    """
    bits = max((rows - 1).bit_length(), 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
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
