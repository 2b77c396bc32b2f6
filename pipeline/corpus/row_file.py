"""The stored form of rows: an Arrow file of some rows, written row by row, and read at random.

    input_ids         uint16 where the vocabulary allows, else int32
    document_starts   bit: the token begins another document than the one before in its row
    padding           bit: the token belongs to no document; of corpora whose rows may be padded
    loss_mask         bit: the token may be a label; of causal rows where not every one may
    labels            int32: the hidden token or -100; of masked rows
    crc32c            uint32, one a row: that of the columns in memory as int32, one after the other

In memory the columns are `labels.Columns`: ids of documents, counted from 0 in every row, in place of the bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from ..base.durable import file_digest
from .labels import IGNORE, LABELS, LOSS_MASK, PADDING, Columns, IntArray, labels_of, row_bytes

STARTS, PADDED, CHECKSUM = "document_starts", "padding", "crc32c"
ROWS_PER_BATCH = 1024  # rows of an Arrow record batch
_UINT16 = 2**16


def stored_columns(vocab_size: int | None, third: str | None) -> dict[str, str]:
    """Name -> Arrow type of the stored columns; `third` is LOSS_MASK or LABELS where there is one beside ids and documents.

    `vocab_size`: tokens are below it, None: unknown.
    """
    small = vocab_size is not None and vocab_size <= _UINT16
    kinds = {"input_ids": "uint16" if small else "int32", STARTS: "bool"}
    if third is not None:
        kinds |= {PADDED: "bool", third: "int32" if third == LABELS else "bool"}
    return kinds


def bytes_per_position(vocab_size: int, third: str | None, row_length: int) -> float:
    """Of a file of rows; arguments as those of `stored_columns`."""
    sizes = {"bool": 1 / 8, "uint16": 2, "int32": 4}
    return sum(sizes[kind] for kind in stored_columns(vocab_size, third).values()) + 4 / row_length


def features_of(kinds: dict[str, str], row_length: int) -> dict[str, Any]:
    """The columns as `datasets` describes them."""
    columns: dict[str, Any] = {
        name: {"feature": {"dtype": kind, "_type": "Value"}, "length": row_length, "_type": "List"}
        for name, kind in kinds.items()
    }
    return columns | {CHECKSUM: {"dtype": "uint32", "_type": "Value"}}


def row_checksum(columns_ML: IntArray) -> int:
    """crc32c of the columns [columns, L] of one row, in order."""
    return int(google_crc32c.value(np.ascontiguousarray(columns_ML, "<i4").tobytes()))


class RowFile:
    """Writes rows to an Arrow file (an IPC stream)."""

    def __init__(self, file: Path, row_length: int, kinds: dict[str, str], metadata: dict[str, str]) -> None:
        self.file, self._row_length, self._kinds = file, row_length, kinds
        columns = {
            name: pa.list_(pa.bool_() if kind == "bool" else pa.type_for_alias(kind), row_length)
            for name, kind in kinds.items()
        }
        self._schema = pa.schema(columns | {CHECKSUM: pa.uint32()}, metadata=metadata)
        self._writer: Any = pa.ipc.new_stream(str(file), self._schema)
        self._sha = hashlib.sha256()
        self.rows = 0
        self.learned = self.padding = 0
        """Positions with a label and positions of padding."""

    def write(self, tokens: IntArray, segments: IntArray, third: IntArray) -> None:
        """Write rows [B, L], at most one Arrow batch; every batch but the last must be full.

        `third`: loss mask or labels, which count where the file has them. Raises ValueError for tokens and padding that it
        cannot hold.
        """
        ids = tokens.astype(self._kinds["input_ids"])
        starts, segments = _starts(segments)
        stored = [ids, starts, segments == PADDING, third][: len(self._kinds)]
        if not np.array_equal(ids, tokens) or (PADDED not in self._kinds and (segments == PADDING).any()):
            raise ValueError("rows with tokens or padding that their file does not hold")
        columns: Columns = {"input_ids": tokens, "segment_ids": segments}
        columns |= {name: third for name in (LOSS_MASK, LABELS) if name in self._kinds}
        rows_BML = np.stack(list(columns.values()), 1)
        batch = [
            pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(values).reshape(-1)).cast(kind.value_type), self._row_length
            )
            for values, kind in zip(stored, list(self._schema.types)[:-1], strict=True)
        ]
        batch.append(pa.array([row_checksum(row_ML) for row_ML in rows_BML], pa.uint32()))
        self._writer.write_batch(pa.record_batch(batch, schema=self._schema))
        self.rows += len(tokens)
        self.padding += int((segments == PADDING).sum())
        self.learned += int((labels_of(columns) != IGNORE).sum())
        self._sha.update(row_bytes(columns))

    def close(self) -> dict[str, Any]:
        """End the file; returns what `portions.json` says of it, but for its name."""
        self.discard()
        return {
            "rows": self.rows,
            "size": self.file.stat().st_size,
            "sha256": file_digest(self.file),
            "digest": self._sha.hexdigest(),
        }

    def discard(self) -> None:
        """Stop writing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class StoredRows:
    """The rows of an Arrow file, memory-mapped."""

    def __init__(self, file: Path, rows: int, row_length: int) -> None:
        """Raises ValueError, or an error of Arrow or the disk, for a file that does not hold `rows` rows of this length."""
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        self._names, self._length = table.column_names[:-1], row_length
        chunks = {name: [chunk for chunk in table[name].chunks if len(chunk)] for name in table.column_names}
        expected = [min(ROWS_PER_BATCH, rows - first) for first in range(0, rows, ROWS_PER_BATCH)]
        if (
            table.column_names[:2] != ["input_ids", STARTS]
            or table.column_names[-1] != CHECKSUM
            or not set(self._names[2:]) <= {PADDED, LOSS_MASK, LABELS}
            or any(kind.list_size != row_length for kind in list(table.schema.types)[:-1])
            or any([len(chunk) for chunk in of_column] != expected for of_column in chunks.values())
        ):
            raise ValueError(f"{table.num_rows} rows with the columns {', '.join(self._names)}, {rows} were written")
        self._ids = [chunk.flatten().to_numpy().reshape(-1, row_length) for chunk in chunks["input_ids"]]
        self._others = {name: [chunk.flatten() for chunk in chunks[name]] for name in self._names[1:]}
        self._checksums = [chunk.to_numpy() for chunk in chunks[CHECKSUM]]

    @property
    def third(self) -> str | None:
        """LOSS_MASK or LABELS, where the rows have it."""
        return next((name for name in (LOSS_MASK, LABELS) if name in self._names), None)

    def read(self, row: int, into_ML: IntArray) -> bool:
        """Read the columns of a row, in order; returns whether their checksum is the one of the row."""
        chunk, place = divmod(row, ROWS_PER_BATCH)
        into_ML[0] = self._ids[chunk][place]
        parts: dict[str, Any] = {
            name: arrays[chunk].slice(place * self._length, self._length).to_numpy(zero_copy_only=False)
            for name, arrays in self._others.items()
        }
        np.cumsum(parts[STARTS], out=into_ML[1])
        if PADDED in parts:
            into_ML[1][parts[PADDED]] = PADDING
        if self.third is not None:
            into_ML[2] = parts[self.third]
        return row_checksum(into_ML) == int(self._checksums[chunk][place])


def _starts(segments: IntArray) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], IntArray]:
    """Segment ids [B, L] -> where a document begins behind another one of its row, and ids that count from 0."""
    padded = segments == PADDING
    before = segments
    if padded.any():
        # Of padding, the document before it; -2 where there is none.
        place = np.maximum.accumulate(np.where(padded, -1, np.arange(segments.shape[1])), 1)
        before = np.where(place < 0, -2, np.take_along_axis(segments, np.maximum(place, 0), 1))
    starts = np.zeros(segments.shape, bool)
    starts[:, 1:] = ~padded[:, 1:] & (segments[:, 1:] != before[:, :-1]) & (before[:, :-1] != -2)
    return starts, np.where(padded, PADDING, np.cumsum(starts, 1, dtype=np.int32)).astype(np.int32)
