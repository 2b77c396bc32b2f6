"""Writing one shard: a zip file, stored without compression, that holds a Zarr v3 group.

    codes/c/0/0  levels/c/0/0  ...      the first block of rows: of every array one shard of Zarr, with a chunk per row
    codes/c/1/0  levels/c/1/0  ...      the next block
    index/c/0/0/0                       where every chunk is in this file, and its crc32c: [row, array, 3]
    */zarr.json, zarr.json              the metadata, and last the directory of the zip file

The file is written from front to back, a block as soon as its rows are there; with arrays whose length is that of the
longest row, rows wait, compressed, for the last one. Readers of this library read the index by one request and then
only chunks; zarr-python opens the file with `zarr.storage.ZipStore`. zarr-python itself needs 12 us a position to write
the same.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from ..base.durable import bytes_digest
from .arrays import Rows, RowShape
from .chunks import (
    CHECKSUM_BYTES,
    INDEX_NAME,
    array_metadata,
    chunk_of,
    group_metadata,
    is_plain,
    stored_row,
    with_checksum,
)

_BLOCK_POSITIONS = 2**13
"""Of a block, 0.6 MB at k = 64. All but the largest array of a row then lie near enough to each other for one request."""
StoredRow = list[tuple[bytes, int]]
"""Of every array the stored row and its number of values."""
_ABSENT = 2**64 - 1
"""Offset and length of a chunk that does not exist, in the index of Zarr's shards."""


class ShardFile:
    """A shard that is being written."""

    def __init__(
        self, path: Path, layout: dict[str, str], shapes: dict[str, RowShape], profile: str, rows: int, row_length: int
    ) -> None:
        """`layout`: name -> dtype of the arrays; `shapes`: name -> shape of their rows."""
        self._layout, self._rows = layout, rows
        self._shapes = shapes
        self._plain = {name: is_plain(name, profile) for name in layout}
        self._block_rows = max(min(_BLOCK_POSITIONS // row_length, rows), 1)
        self._file = path.open("w+b")
        self._zip = ZipFile(self._file, "w", ZIP_STORED)
        self._waiting: list[StoredRow] = []
        """Rows that are not in the file yet."""
        self._longest = dict.fromkeys(layout, 1)
        """Values of the longest row; no axis is empty."""
        self._written = 0
        self._index = np.zeros((rows, len(layout), 3), "<u8")

    def close(self) -> None:
        """Close the file, complete or not; what is incomplete is worth no error."""
        for file in (self._zip, self._file):
            with suppress(OSError, ValueError):
                file.close()

    def compressed(self, rows: Rows) -> list[StoredRow]:
        """Rows, of every array a list of flat arrays, as `add` takes them. Threads may do this at the same time."""
        columns = []
        for name, dtype in self._layout.items():
            plain = self._plain[name]
            columns.append(
                [(stored_row(values.astype(dtype, copy=False), plain), len(values)) for values in rows[name]]
            )
        return list(map(list, zip(*columns, strict=True)))

    def add(self, rows: list[StoredRow]) -> None:
        """Append rows."""
        for row in rows:
            for name, (_, length) in zip(self._layout, row, strict=True):
                self._longest[name] = max(self._longest[name], length)
        self._waiting += rows
        if None not in self._shapes.values():
            self._write_blocks(self._block_rows)

    def finish(self) -> dict[str, Any]:
        """Complete the file; returns what a commit record says of it. Raises ValueError where rows are missing."""
        self._write_blocks(1)
        if self._written != self._rows:
            raise ValueError(f"{self._written} rows of a shard of {self._rows}")
        small = int(self._index[..., :2].max(initial=0)) < 2**32
        stored = with_checksum(self._index.astype("<u4" if small else "<u8").tobytes())
        place = self._member(f"{INDEX_NAME}/c/0/0/0", stored)
        metadata = {
            f"{name}/zarr.json": array_metadata(
                (self._rows, *self._shape(name)), dtype, self._block_rows, self._plain[name]
            )
            for name, dtype in self._layout.items()
        }
        metadata[f"{INDEX_NAME}/zarr.json"] = array_metadata(
            self._index.shape, "uint32" if small else "uint64", None, True, {"arrays": list(self._layout)}
        )
        metadata["zarr.json"] = group_metadata()
        for name, value in metadata.items():
            self._member(name, json.dumps(value).encode())
        self._zip.close()
        # By the open file: another task may have discarded its name.
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        size = self._file.tell()
        self._file.close()
        return {
            "size": size,
            "sha256": sha256,
            "index": {"offset": place, "length": len(stored), "sha256": bytes_digest(stored)},
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] or (self._longest[name],)

    def _write_blocks(self, fewest: int) -> None:
        """Write the rows that wait, in blocks, the last one only if it has at least `fewest` rows."""
        while len(self._waiting) >= fewest:
            block, self._waiting = self._waiting[: self._block_rows], self._waiting[self._block_rows :]
            for number, (name, dtype) in enumerate(self._layout.items()):
                values = int(np.prod(self._shape(name)))
                chunks = [
                    chunk_of(stored, dtype, values - length, self._plain[name])
                    for stored, length in (row[number] for row in block)
                ]
                self._write_array(number, name, chunks)
            self._written += len(block)

    def _write_array(self, number: int, name: str, chunks: list[bytes]) -> None:
        """Write one shard of Zarr: the chunks of a block of rows."""
        lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
        offsets = np.cumsum(lengths) - lengths
        places = np.full((self._block_rows, 2), _ABSENT, "<u8")
        places[: len(chunks)] = np.stack([offsets, lengths], 1)
        axes = [self._written // self._block_rows, *[0] * len(self._shape(name))]
        content = b"".join([*chunks, with_checksum(places.tobytes())])
        begin = self._member("/".join([name, "c", *map(str, axes)]), content)
        index = self._index[self._written : self._written + len(chunks), number]
        index[:, 0], index[:, 1] = offsets + np.uint64(begin), lengths
        index[:, 2] = [int.from_bytes(chunk[-CHECKSUM_BYTES:], "little") for chunk in chunks]

    def _member(self, name: str, content: bytes) -> int:
        """Write a member of the zip file; returns where its content begins."""
        facts = ZipInfo(name)
        facts.create_system = 3  # the same on every system
        self._zip.writestr(facts, content)
        return self._file.tell() - len(content)
