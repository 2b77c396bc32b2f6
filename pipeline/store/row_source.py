"""Sources of training rows: the protocol of caches and views, and base classes that implement most of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from ..base.durable import json_digest
from .arrays import RowIndices
from .batch import Batch, unbatch
from .signals import Signal


class RowSource(Protocol):
    """The facts and rows that a cache, and every view of one, offers to training."""

    @property
    def row_length(self) -> int:
        """Tokens per row, L."""

    @property
    def vocab_size(self) -> int:
        """V, the largest of the teachers' output layers."""

    @property
    def objective(self) -> str:
        """causal or masked: what labels and targets predict."""

    @property
    def signals(self) -> dict[str, Signal]:
        """The signals of every row, by name."""

    @property
    def knots(self) -> tuple[float, ...]:
        """Inverse temperatures at which the tail mass is known."""

    @property
    def digest(self) -> str:
        """One digest of everything that determines the rows and their order."""

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the token ids."""

    @property
    def tokenizer_dir(self) -> Path:
        """The directory from which that tokenizer loads."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        """Rows in the order of `indices`, stacked on a leading axis."""

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        """[B, L] the document of each token, numbered in its row; reads no targets."""


class RowDataset(Dataset[Batch]):
    """A source of rows as a map-style torch Dataset, through `batch`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        """Rows in the order of `indices`, stacked on a leading axis. Raises IndexError for a row out of range."""

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


class View(RowDataset):
    """A view with the facts of its first source."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    @property
    def row_length(self) -> int:
        return self._source.row_length

    @property
    def vocab_size(self) -> int:
        return self._source.vocab_size

    @property
    def objective(self) -> str:
        return self._source.objective

    @property
    def signals(self) -> dict[str, Signal]:
        return self._source.signals

    @property
    def knots(self) -> tuple[float, ...]:
        return self._source.knots

    @property
    def digest(self) -> str:
        return json_digest([type(self).__name__, *self._settings()])

    @property
    def tokenizer_digest(self) -> str:
        return self._source.tokenizer_digest

    @property
    def tokenizer_dir(self) -> Path:
        return self._source.tokenizer_dir

    @abstractmethod
    def _settings(self) -> list[Any]:
        """Everything that determines the view's rows and their order, for the digest."""

    @abstractmethod
    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]: ...
