"""Documents -> rows: end to end, or each whole in one row. `masking.Framer` packs those of masked models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from .labels import PADDING, IntArray

RowBlock = tuple[IntArray, IntArray, IntArray]
"""Whole rows: tokens, segment ids and loss mask, all [B, L]."""
_OPEN_ROWS = 64
"""Rows that wait for a document that fits: of mixed lengths (log-normal, a median of 0.3 rows) less than 3 % become
padding."""


class Packer(Protocol):
    """What turns the documents of one side of a corpus into rows, in order."""

    def add(self, tokens: IntArray, loss_mask: IntArray) -> Iterator[RowBlock]:
        """A document, tokens [n] and loss mask [n] -> the rows that it completes."""

    def finish(self) -> Iterator[RowBlock]:
        """The rows at the end of the corpus."""

    @property
    def left(self) -> int:
        """Tokens that are in no row."""


class EndToEnd:
    """Documents one after the other: what is left of a document at a row's end goes on in the next row.

    That row begins with the tokens of `row_start`, where the document itself begins with them: a teacher that was
    trained with a BOS in front of every text is much worse without. Nothing is predicted from the inserted tokens: the
    token after them stands in the middle of its document, which they do not tell.
    """

    def __init__(self, row_length: int, row_start: Sequence[int] = ()) -> None:
        self._length, self._start = row_length, np.asarray(row_start, np.int32)
        self._row = np.zeros((3, row_length), np.int32)
        self._filled = self._segment = 0

    def add(self, tokens: IntArray, loss_mask: IntArray) -> Iterator[RowBlock]:
        first = min(self._length - self._filled, len(tokens))
        self._append(tokens[:first], loss_mask[:first])
        self._segment += 1
        if self._filled < self._length:
            return
        yield _block(self._row[:, None].copy())
        self._filled = self._segment = 0
        start = self._start if np.array_equal(tokens[: len(self._start)], self._start) else self._start[:0]
        room = self._length - len(start)
        rest = len(tokens) - (len(tokens) - first) % room
        if rest > first:
            whole_rows = (part[first:rest].reshape(-1, room) for part in (tokens, loss_mask))
            yield _block(_continued(start, *whole_rows))
        if rest < len(tokens):
            ids, _, mask = _continued(start, tokens[None, rest:], loss_mask[None, rest:])
            self._append(ids[0], mask[0])
            self._segment = 1

    def finish(self) -> Iterator[RowBlock]:
        yield from ()

    @property
    def left(self) -> int:
        return self._filled

    def _append(self, tokens: IntArray, loss_mask: IntArray) -> None:
        at = slice(self._filled, self._filled + len(tokens))
        self._row[0, at], self._row[1, at], self._row[2, at] = tokens, self._segment, loss_mask
        self._filled += len(tokens)


class WholeDocuments:
    """Every document in one row: it goes into the fullest open row that has room for it; rests of rows are padded.

    A document longer than a row loses its end (`cut`), or is left out.
    """

    def __init__(self, row_length: int, padding: int, cut: bool) -> None:
        """`padding`: the token that fills rows."""
        self._length, self._padding, self._cut = row_length, padding, cut
        self._open: list[tuple[IntArray, int, int]] = []
        """Row [3, L], filled positions, documents."""
        self.long_documents = 0
        """Longer than a row."""
        self._lost = 0

    def add(self, tokens: IntArray, loss_mask: IntArray) -> Iterator[RowBlock]:
        if len(tokens) > self._length:
            self.long_documents += 1
            self._lost += len(tokens) - (self._length if self._cut else 0)
            if not self._cut:
                return
        tokens, loss_mask = tokens[: self._length], loss_mask[: self._length]
        fitting = [entry for entry in self._open if entry[1] + len(tokens) <= self._length]
        if fitting:
            chosen = max(fitting, key=lambda entry: entry[1])
            self._open = [entry for entry in self._open if entry is not chosen]
            row, filled, segment = chosen
        else:
            row, filled, segment = self._empty(), 0, 0
        at = slice(filled, filled + len(tokens))
        row[0, at], row[1, at], row[2, at] = tokens, segment, loss_mask
        filled += len(tokens)
        if filled == self._length:
            yield _block(row[:, None])
            return
        self._open.append((row, filled, segment + 1))
        if len(self._open) > _OPEN_ROWS:
            fullest = max(self._open, key=lambda entry: entry[1])
            self._open = [entry for entry in self._open if entry is not fullest]
            yield _block(fullest[0][:, None])

    def finish(self) -> Iterator[RowBlock]:
        while self._open:
            yield _block(self._open.pop(0)[0][:, None])

    @property
    def left(self) -> int:
        return self._lost + sum(filled for _, filled, _ in self._open)

    def _empty(self) -> IntArray:
        row = np.zeros((3, self._length), np.int32)
        row[0], row[1] = self._padding, PADDING
        return row


def _continued(start: IntArray, tokens_BL: IntArray, mask_BL: IntArray) -> IntArray:
    """Pieces of a document [B, L] behind the tokens of `start` -> tokens, segment ids and loss mask, longer by these."""
    rows = np.zeros((3, len(tokens_BL), len(start) + tokens_BL.shape[1]), np.int32)
    rows[0, :, : len(start)], rows[0, :, len(start) :], rows[2, :, len(start) :] = start, tokens_BL, mask_BL
    if len(start):
        rows[2, :, len(start)] = 0
    return rows


def _block(rows_3BL: IntArray) -> RowBlock:
    tokens, segments, loss_mask = rows_3BL
    return tokens, segments, loss_mask
