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

    def add(self, tokens: IntArray, loss_mask: IntArray, lengths: IntArray | None = None) -> Iterator[RowBlock]:
        """Documents end to end, tokens [N] and loss mask [N], of these lengths -> the rows that they complete.

        Without lengths they are one document.
        """

    def most_rows(self, tokens: int, documents: int) -> int:
        """A number of rows that so many tokens of so many documents cannot exceed."""

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
        self._rest = np.zeros((3, 0), np.int32)
        """Tokens, numbers of their documents, and loss mask of the row that is not full."""

    def add(self, tokens: IntArray, loss_mask: IntArray, lengths: IntArray | None = None) -> Iterator[RowBlock]:
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        first = self._rest[1, -1] + 1 if self.left else 0
        numbers = np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths)
        if len(self._start) and (places := self._continued(tokens, lengths)):
            loss_mask = loss_mask.copy()
            loss_mask[places] = 0
            count = len(self._start)
            at = np.repeat(places, count)
            tokens = np.insert(tokens, at, np.tile(self._start, len(places)))
            numbers, loss_mask = np.insert(numbers, at, numbers[at]), np.insert(loss_mask, at, 0)
        stream = np.concatenate([self._rest, np.stack([tokens, numbers, loss_mask])], 1)
        whole = stream.shape[1] // self._length * self._length
        self._rest = stream[:, whole:].copy()
        self._rest[1] -= self._rest[1, :1]
        if whole:
            rows = stream[:, :whole].reshape(3, -1, self._length)
            rows[1] -= rows[1, :, :1].copy()
            yield _block(rows)

    def most_rows(self, tokens: int, documents: int) -> int:
        return (self.left + tokens) // (self._length - len(self._start))

    def finish(self) -> Iterator[RowBlock]:
        yield from ()

    @property
    def left(self) -> int:
        return self._rest.shape[1]

    def _continued(self, tokens: IntArray, lengths: IntArray) -> list[int]:
        """The places of tokens with which rows begin that continue a document, behind a start."""
        places, filled, begin = list[int](), self.left, 0
        for length in lengths.tolist():
            rest = filled + length - self._length
            if rest < 0:
                filled += length
            elif rest == 0:
                filled = 0
            else:
                count = len(self._start)
                count = count if np.array_equal(tokens[begin : begin + count], self._start) else 0
                if count:
                    places += range(begin + length - rest, begin + length, self._length - count)
                filled = rest % (self._length - count)
                filled += count if filled else 0
            begin += length
        return places


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

    def add(self, tokens: IntArray, loss_mask: IntArray, lengths: IntArray | None = None) -> Iterator[RowBlock]:
        for place in places_of(lengths, len(tokens)):
            yield from self._add(tokens[place], loss_mask[place])

    def most_rows(self, tokens: int, documents: int) -> int:
        return documents

    def _add(self, tokens: IntArray, loss_mask: IntArray) -> Iterator[RowBlock]:
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


def places_of(lengths: IntArray | None, tokens: int) -> Iterator[slice]:
    """Where each document lies that these tokens are, end to end."""
    begin = 0
    for length in [tokens] if lengths is None else lengths.tolist():
        yield slice(begin, begin + length)
        begin += length


def _block(rows_3BL: IntArray) -> RowBlock:
    tokens, segments, loss_mask = rows_3BL
    return tokens, segments, loss_mask
