"""Sources of training rows: the base class of caches and views, with the facts and rows that training reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..base.durable import json_digest
from ..base.errors import RecipeError
from .arrays import RowIndices, RowLosses
from .batch import Batch, unbatch
from .shard_order import RowsByShard
from .shard_readers import ShardReaders
from .signals import Signal


class RowSource(Dataset[Batch]):
    """Rows with their targets as a map-style torch Dataset; a source implements `batch`."""

    row_length: int
    """Tokens per row, L."""
    vocab_size: int
    """V, the largest of the teachers' output layers."""
    objective: str
    """causal or masked: what labels and targets predict."""
    signals: dict[str, Signal]
    """The signals of every row, by name."""
    knots: tuple[float, ...]
    """Inverse temperatures at which the tail mass is known."""
    tokenizer_digest: str
    """Digest of the tokenizer that made the token ids."""
    tokenizer_dir: Path
    """The directory from which that tokenizer loads."""
    readers: Sequence[ShardReaders] = ()
    """Those of the caches that rows come from; of several views of one cache as often. None of other rows."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """One digest of everything that determines the rows and their order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        """Rows in the order of `indices`, stacked on a leading axis. Raises IndexError for a row out of range."""

    @abstractmethod
    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        """[B, L] the document of each token, numbered in its row; reads no targets."""

    def origins(self, indices: RowIndices) -> RowIndices:
        """[2, B, N] where rows are read from: the number of the cache in `readers`, and the row of its corpus.

        N is the number of teachers whose targets a row has.
        """
        return np.zeros((2, len(self.checked(indices)), 1), np.int64)

    def by_shard(self) -> RowsByShard:
        """All rows by the shards that they are read from, of several teachers those of the first."""
        if not len(self) or not self.readers:
            return RowsByShard(np.full(min(len(self), 1), len(self)), np.zeros(min(len(self), 1), np.int64))
        caches, rows = self.origins(np.arange(len(self)))[:, :, 0]
        order = np.lexsort([rows, caches])
        shards = np.stack([caches, rows // np.array([cache.manifest.shard_rows for cache in self.readers])[caches]])
        found, sizes = np.unique(shards[:, order], axis=1, return_counts=True)
        return RowsByShard(sizes, found[0], order)

    def teacher_losses(self, indices: Sequence[int] | RowIndices | None = None) -> RowLosses:
        """The teacher's mean loss on the labels of each row, in nats; 0 for a row without. None: of all rows.

        Decodes no targets. Raises RecipeError for rows of which it is not kept: only caches with label_log_probs have
        it.
        """
        raise RecipeError(f"{type(self).__name__} does not know the teacher's loss on its rows: ask the cache itself")

    def __getitem__(self, index: int) -> Batch:
        """One row: input_ids, labels, segment_ids [L] and targets [L]."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several rows, decoded together; DataLoader calls this instead of `__getitem__`."""
        return unbatch(self.batch(indices))

    def checked(self, indices: Sequence[int] | RowIndices) -> RowIndices:
        """Indices as an array, negative ones counted from the end. Raises IndexError for none, or one out of range."""
        rows = np.asarray(indices, np.int64)
        if len(rows) == 0 or rows.min() < -len(self) or rows.max() >= len(self):
            raise IndexError(f"rows {list(indices)} are outside 0..{len(self) - 1}")
        return np.where(rows < 0, rows + len(self), rows)


class View(RowSource):
    """A view with the facts of its source."""

    _rows: RowIndices
    """The row of its source that each row comes from."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self.row_length, self.vocab_size, self.objective = source.row_length, source.vocab_size, source.objective
        self.signals, self.knots = source.signals, source.knots
        self.tokenizer_digest, self.tokenizer_dir = source.tokenizer_digest, source.tokenizer_dir
        self.readers = source.readers

    def __len__(self) -> int:
        return len(self._rows)

    def origins(self, indices: RowIndices) -> RowIndices:
        return self._source.origins(self._rows[self.checked(indices)])

    @property
    def digest(self) -> str:
        return json_digest([type(self).__name__, *self._settings()])

    @abstractmethod
    def _settings(self) -> list[Any]:
        """Everything that determines the view's rows and their order, for the digest."""
