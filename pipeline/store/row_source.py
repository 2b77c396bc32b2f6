"""row_source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from ..base.durable import json_digest
from .batch import Batch, IndexArray, split
from .signals import Signal


class Rows(Protocol):
    """What a cache and every view of it can be asked."""

    @property
    def row_length(self) -> int:
        """Tokens per row, L."""

    @property
    def vocab_size(self) -> int:
        """The largest of the teachers' output layers."""

    @property
    def objective(self) -> str:
        """causal or masked: what labels and targets predict."""

    @property
    def signals(self) -> dict[str, Signal]:
        """What rows have beside the targets, by name."""

    @property
    def knots(self) -> tuple[float, ...]:
        """Inverse temperatures at which the tail is known."""

    @property
    def digest(self) -> str:
        """One digest of everything that determines the rows and their order."""

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the token ids."""

    @property
    def tokenizer_dir(self) -> Path:
        """Where that tokenizer can be loaded from."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """Rows in the order asked for, stacked on a leading axis."""

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        """Which document of its row every token belongs to [R, L], without reading targets."""


class _View(Dataset[Batch]):
    """A view whose facts are those of its first source."""

    def __init__(self, source: Rows) -> None:
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
        return json_digest([type(self).__name__, *self._made_of()])

    @property
    def tokenizer_digest(self) -> str:
        return self._source.tokenizer_digest

    @property
    def tokenizer_dir(self) -> Path:
        return self._source.tokenizer_dir

    @abstractmethod
    def _made_of(self) -> list[Any]:
        """What the digest is taken of."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int] | IndexArray) -> Batch: ...

    @abstractmethod
    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]: ...

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        return split(self.batch(indices))

    def _checked(self, indices: Sequence[int] | IndexArray) -> IndexArray:
        wanted = np.asarray(indices, np.int64)
        if len(wanted) == 0 or wanted.min() < -len(self) or wanted.max() >= len(self):
            raise IndexError(f"rows {list(indices)} are outside 0..{len(self) - 1}")
        return np.where(wanted < 0, wanted + len(self), wanted)
