"""Views of one cache: fewer rows, shorter rows. `mixture` has those of several caches.

A view stores no data. It is a `RowSource`, as a cache is, so views nest and go wherever a cache goes:

    Subset(cache, range(1000))               chosen rows
    ShorterRows(cache, 512)                  rows cut to 512 tokens
    Mixture([web, code], [0.7, 0.3])         rows of several caches in given shares
    Ensemble([teacher_a, teacher_b])         the same rows, the mean of several teachers
    RowStream(rows, seed=0)                  an iterable dataset: every row once per epoch, over workers and ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from ..corpus.labels import PADDING
from .arrays import RowIndices, RowLosses
from .batch import Batch, map_batch
from .row_source import RowSource, View

_SCAN_ROWS = 1024


class Subset(View):
    """Chosen rows of a source, in the given order; a row may repeat."""

    def __init__(self, source: RowSource, rows: Sequence[int] | RowIndices) -> None:
        """Raises IndexError for a row outside the source."""
        super().__init__(source)
        self._rows = np.asarray(rows, np.int64)
        if len(self._rows) and (self._rows.min() < 0 or self._rows.max() >= len(source)):
            raise IndexError(f"a row of the subset is outside 0..{len(source) - 1}")

    def _settings(self) -> list[Any]:
        return [self._source.digest, self._rows.tolist()]

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        return self._source.batch(self._rows[self.checked(indices)])

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        return self._source.segment_ids(self._rows[self.checked(indices)])

    def teacher_losses(self, indices: Sequence[int] | RowIndices | None = None) -> RowLosses:
        return self._source.teacher_losses(self._rows if indices is None else self._rows[self.checked(indices)])


class ShorterRows(View):
    """Rows of `length` tokens out of longer ones.

    A target at t depends on the tokens of its document up to t, and on no later token. Without the *end* of a row,
    every remaining target is still exactly the teacher's. Without the *start* of a document it is not: the teacher read
    tokens that the student lacks. So pieces begin where a row or a document begins: the first `length` tokens of a row,
    then `length` tokens from the first document that starts at or after the end of the last piece, while a whole piece
    fits. Every token belongs to at most one piece; tokens in no piece are omitted (`kept` is the share of the others).
    """

    def __init__(self, source: RowSource, length: int) -> None:
        """Raises ValueError for a length outside 2..L, and for masked rows."""
        super().__init__(source)
        if source.objective == "masked":
            raise ValueError("masked rows cannot be cut: the teacher read both sides of every token")
        if not 2 <= length <= source.row_length:
            raise ValueError(f"length {length} is outside 2..{source.row_length}, the length of the cached rows")
        self.row_length = length
        pieces = np.array(list(_pieces(source, length)), np.int64).reshape(-1, 2)
        self._rows, self._starts = pieces[:, 0], pieces[:, 1]

    @property
    def kept(self) -> float:
        """The share of the source's tokens in pieces."""
        return len(self) * self.row_length / max(len(self._source) * self._source.row_length, 1)

    def _settings(self) -> list[Any]:
        return [self._source.digest, self.row_length]

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        wanted = self.checked(indices)
        whole = self._source.segment_ids(self._rows[wanted])
        at = self._starts[wanted, None] + np.arange(self.row_length)
        pieces: np.ndarray[Any, Any] = whole[np.arange(len(wanted))[:, None], at]
        pieces -= pieces[:, :1].copy()
        return pieces

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        wanted = self.checked(indices)
        whole = self._source.batch(self._rows[wanted])
        at = torch.from_numpy(self._starts[wanted]).unsqueeze(-1) + torch.arange(self.row_length)
        row = torch.arange(len(wanted)).unsqueeze(-1)
        # The label of the last token lies outside the piece; it and its target remain valid.
        pieces = cast(dict[str, Any], map_batch(whole, lambda value: value[row, at]))
        pieces["segment_ids"] = pieces["segment_ids"] - pieces["segment_ids"][:, :1]
        for name in pieces:
            if name in self.signals and self.signals[name].kind == "attention":  # [B, length, A, L]: cut L too
                other = at[:, None, None].expand(*pieces[name].shape[:-1], self.row_length)
                pieces[name] = pieces[name].gather(-1, other)
        return cast(Batch, pieces)


def _pieces(source: RowSource, length: int) -> Iterator[tuple[int, int]]:
    """(row, start) of every piece of `length` tokens."""
    for first in range(0, len(source), _SCAN_ROWS):
        rows = np.arange(first, min(first + _SCAN_ROWS, len(source)))
        for row, segments in zip(rows.tolist(), source.segment_ids(rows), strict=True):
            starts = np.concatenate([[0], np.flatnonzero(segments[1:] != segments[:-1]) + 1])
            starts = starts[segments[starts] != PADDING]
            free = 0
            for start in starts:
                if start >= free and start + length <= len(segments):
                    yield row, int(start)
                    free = start + length
