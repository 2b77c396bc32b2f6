"""Other shapes of the same cache, all read like one: fewer rows, shorter rows, several caches, several teachers.

A view holds no data. It has what training asks of a cache (`len`, rows, `batch`, and the facts of `Rows`), so views nest
and go wherever a cache goes:

    Subset(cache, range(1000))               some rows
    ShorterRows(cache, 512)                  rows cut to 512 tokens
    Mixture([web, code], [0.7, 0.3])         rows of several caches in given shares
    Ensemble([teacher_a, teacher_b])         the same rows, the mean of several teachers
    RowStream(rows, seed=0)                  an iterable dataset: every row once per epoch, shared by workers and ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from .batch import Batch, IndexArray, each
from .row_source import Rows, _View

_SCAN_ROWS = 1024


class Subset(_View):
    """Some rows of a source, in the order given; a row may be named several times."""

    def __init__(self, source: Rows, rows: Sequence[int] | IndexArray) -> None:
        """Raises IndexError for a row that is not there."""
        super().__init__(source)
        self._rows = np.asarray(rows, np.int64)
        if len(self._rows) and (self._rows.min() < 0 or self._rows.max() >= len(source)):
            raise IndexError(f"a row of the subset is outside 0..{len(source) - 1}")

    def _made_of(self) -> list[Any]:
        return [self._source.digest, self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        return self._source.batch(self._rows[self._checked(indices)])

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        return self._source.segment_ids(self._rows[self._checked(indices)])


class ShorterRows(_View):
    """Rows of `length` tokens out of longer ones.

    A target at t depends on the tokens of its document up to t, and on nothing after. Cutting the *end* of a row
    therefore leaves every remaining target exactly what the teacher would say. Cutting the *start* in the middle of a
    document would not: the teacher saw what the student then does not. So pieces begin where a row or a document begins:
    the first `length` tokens of a row, then, from the first document that starts at or after the end of the piece before,
    the next ones, as long as a whole piece fits. Every token belongs to at most one piece; those that fit into none are
    left out (`kept` says what share is not).
    """

    def __init__(self, source: Rows, length: int) -> None:
        """Raises ValueError for a length that is not between 2 and the rows' own, and for masked rows."""
        super().__init__(source)
        if source.objective == "masked":
            raise ValueError("masked rows cannot be cut: the teacher saw both sides of every token")
        if not 2 <= length <= source.row_length:
            raise ValueError(f"length {length} is outside 2..{source.row_length}, the length of the cached rows")
        self._length = length
        rows: list[int] = []
        starts: list[int] = []
        for first in range(0, len(source), _SCAN_ROWS):
            segments = source.segment_ids(np.arange(first, min(first + _SCAN_ROWS, len(source))))
            for row, start in _pieces(segments, length):
                rows.append(first + row)
                starts.append(start)
        self._rows, self._starts = np.asarray(rows, np.int64), np.asarray(starts, np.int64)

    @property
    def row_length(self) -> int:
        return self._length

    @property
    def kept(self) -> float:
        """Share of the source's tokens that are in some piece."""
        return len(self) * self._length / max(len(self._source) * self._source.row_length, 1)

    def _made_of(self) -> list[Any]:
        return [self._source.digest, self._length]

    def __len__(self) -> int:
        return len(self._rows)

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        wanted = self._checked(indices)
        whole = self._source.segment_ids(self._rows[wanted])
        at = self._starts[wanted, None] + np.arange(self._length)
        pieces: np.ndarray[Any, Any] = whole[np.arange(len(wanted))[:, None], at]
        pieces -= pieces[:, :1].copy()
        return pieces

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        wanted = self._checked(indices)
        whole = self._source.batch(self._rows[wanted])
        at = torch.from_numpy(self._starts[wanted]).unsqueeze(-1) + torch.arange(self._length)
        row = torch.arange(len(wanted)).unsqueeze(-1)
        # The last token's label lies outside the piece. It is still a valid thing to predict, and so is its target.
        pieces = cast(dict[str, Any], each(whole, lambda value: value[row, at]))
        pieces["segment_ids"] = pieces["segment_ids"] - pieces["segment_ids"][:, :1]
        for name in pieces:
            if name.startswith("attention."):  # [B, length, H, L]: the other end of each pair is cut too
                other = at[:, None, None].expand(*pieces[name].shape[:-1], self._length)
                pieces[name] = pieces[name].gather(-1, other)
        return cast(Batch, pieces)


def _pieces(segment_ids: np.ndarray[Any, Any], length: int) -> Iterator[tuple[int, int]]:
    """(row, start) of every piece of `length` tokens that starts where its row or a document starts."""
    for row, segments in enumerate(segment_ids):
        starts = np.concatenate([[0], np.flatnonzero(segments[1:] != segments[:-1]) + 1])
        free = 0
        for start in starts:
            if start >= free and start + length <= len(segments):
                yield row, int(start)
                free = start + length
