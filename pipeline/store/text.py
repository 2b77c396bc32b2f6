"""The text of rows as a shard stores it: what a student reads beside the targets.

    input_codes     `compact`: codes of the codebook, each with the token before it as context (the first: token 0)
    input_ids       `fast`: the ids
    segment_steps   the document of each token less that of the token before (the first: less 0)
    loss_steps      the loss mask, likewise; of rows that have one
    labels          as they are; of masked rows

Steps are nearly all 0, so that they compress to a few bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..base.kernels import compiled
from ..corpus.labels import LABELS, LOSS_MASK, Columns, IntArray
from ..recipe.choices import Profile
from .arrays import Array, Rows, RowShape, StoredRows, flat_rows, joined
from .codebook import Codebook

_STEPS = {"segment_ids": "segment_steps", LOSS_MASK: "loss_steps"}
"""Column -> the array of its steps."""


@dataclass(frozen=True)
class TextCodec:
    """The stored form of the columns of a corpus."""

    columns: Sequence[str]
    row_length: int
    vocab_size: int
    profile: Profile
    codebook: Codebook | None
    """None: a code is the token's id."""

    def layout(self) -> dict[str, str]:
        """Name -> dtype of every stored array."""
        steps = "int16" if self.row_length < 2**15 else "int32"
        kinds = {
            "input_codes": "uint32",  # compressed, as small as uint16
            "input_ids": "uint16" if self.vocab_size <= 2**16 else "uint32",
            _STEPS["segment_ids"]: steps,
            _STEPS[LOSS_MASK]: "int16",
            LABELS: "int32",
        }
        return {array: kinds[array] for array in self._arrays.values()}

    def shapes(self) -> dict[str, RowShape]:
        """Name -> shape of a row of each of them."""
        return dict.fromkeys(self._arrays.values(), (self.row_length,))

    @property
    def segment_arrays(self) -> list[str]:
        """The arrays that `segment_ids` decodes."""
        return [_STEPS["segment_ids"]]

    def encode(self, columns: Columns) -> Rows:
        """Columns [B, L] -> the rows of every array.

        Raises ValueError for columns other than those of the codec, and for numbers that its arrays do not hold.
        """
        if list(columns) != list(self.columns):
            raise ValueError(f"rows with the columns {', '.join(columns)}: the cache has {', '.join(self.columns)}")
        arrays = {}
        for (column, values), (array, dtype) in zip(columns.items(), self.layout().items(), strict=True):
            stored = values.astype(np.int64)
            if column == "input_ids":
                if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.vocab_size:
                    raise ValueError(f"rows with token {int(values.max())}: the vocabulary has {self.vocab_size}")
                stored = self._codes(stored)
            elif column in _STEPS:
                stored = np.diff(stored, axis=1, prepend=0)
            arrays[array] = stored.astype(dtype)
            if not np.array_equal(arrays[array], stored):
                raise ValueError(f"rows with numbers in {column} that {dtype} does not hold")
        return flat_rows(arrays)

    def decode(self, rows: StoredRows) -> Columns:
        """Stored rows -> columns [B, L] int32. Raises ValueError for numbers that no encoder writes."""
        columns = {}
        for column, array in self._arrays.items():
            values = self._whole(rows, array)
            if column in _STEPS:
                values = np.cumsum(values, 1, dtype=np.int32)
            elif array == "input_codes" and self.codebook is not None:
                values = self._tokens(values, self.codebook)
            elif column == "input_ids" and int(values.max(initial=0)) >= self.vocab_size:
                raise ValueError("tokens outside the vocabulary")
            columns[column] = values.astype(np.int32, copy=False)
        return columns

    def segment_ids(self, rows: StoredRows) -> IntArray:
        """The same of the column `segment_ids` alone."""
        return np.cumsum(self._whole(rows, _STEPS["segment_ids"]), 1, dtype=np.int32)

    def _whole(self, rows: StoredRows, array: str) -> Array:
        """[B, L]"""
        stored = rows[array]
        values = joined(array, stored, self.layout()[array], [self.row_length] * len(stored), whole=True)
        return values.reshape(-1, self.row_length)

    def _codes(self, ids_BL: Array) -> Array:
        if self.codebook is None or self.profile == "fast":
            return ids_BL
        contexts_BL = np.zeros_like(ids_BL)
        contexts_BL[:, 1:] = ids_BL[:, :-1]
        return self.codebook.encode(ids_BL.reshape(-1), contexts_BL.reshape(-1)).reshape(ids_BL.shape)

    def _tokens(self, codes_BL: Array, book: Codebook) -> Array:
        ids_BL = np.empty(codes_BL.shape, np.int32)
        if not _follow(codes_BL, book.start, book.length, book.table, ids_BL):
            raise ValueError("codes of tokens outside the scale")
        return ids_BL

    @cached_property
    def _arrays(self) -> dict[str, str]:
        """Column -> its array."""
        return {column: self._ids if column == "input_ids" else _STEPS.get(column, column) for column in self.columns}

    @property
    def _ids(self) -> str:
        return "input_ids" if self.profile == "fast" else "input_codes"


@compiled
def _follow(codes_BL: Array, start_V: Array, length_V: Array, table: Array, ids_BL: Array) -> bool:
    """Decode codes [B, L] whose context is the token before. False where a code is outside the table."""
    order = len(table) - len(length_V)
    context_B = np.zeros(len(codes_BL), np.int64)
    # Row by row, every step would wait for the one before: rows are independent, and their reads of the table overlap.
    for position in range(codes_BL.shape[1]):
        for row in range(len(codes_BL)):
            context, code = context_B[row], np.int64(codes_BL[row, position])
            length = np.int64(length_V[context])
            place = start_V[context] + code if code < length else order + code - length
            if place >= len(table):
                return False
            context_B[row] = ids_BL[row, position] = table[place]
    return True
