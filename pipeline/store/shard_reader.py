"""Reading one shard: its index by one request, then chunks, each checked against the index.

The commit record has place and digest of the index, so a chunk of another file is refused though its own checksum is
right. A `ShardReader` keeps the index in memory. It is safe in forked workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from pcodec import standalone

from ..base.durable import bytes_digest
from ..base.errors import CorruptError
from ..base.places import Place, RemotePath, read_ranges
from .arrays import Array, RowIndices, StoredRows
from .chunks import CHECKSUM_BYTES, is_plain, with_checksum

INDEX_BYTES = 12
"""Memory of one entry of a reader's index."""
_CHECKSUM_OF_CHECKED = 0x48674BC7
"""The crc32c of any bytes followed by their own crc32c, little-endian."""


class ShardReader:
    """One shard and the index of its chunks; `read_rows` reads rows through it."""

    def __init__(
        self,
        file: Place,
        layout: dict[str, str],
        profile: str,
        rows: int,
        record: dict[str, Any],
        copies: Sequence[Path] = (),
    ):
        """`layout`: name -> dtype of the arrays; `record`: the commit record; `copies`: where copies of a remote file are
        if there are any, whole or with holes."""
        self.file, self._rows, self._copies = file, rows, copies
        self._place, self._size = record["index"], record["size"]
        self.dtypes = {name: None if not is_plain(name, profile) else np.dtype(dtype) for name, dtype in layout.items()}
        """Array -> dtype of its chunks; None where they are compressed."""
        self._opened: dict[str, int] = {}
        """The descriptor, while the file is open."""
        self._chunks: np.ndarray[Any, np.dtype[Any]] | None = None

    @property
    def indexed(self) -> bool:
        """Whether the index is in memory."""
        return self._chunks is not None

    @property
    def chunks(self) -> np.ndarray[Any, np.dtype[Any]]:
        """[rows, arrays, 3] offset, length and crc32c of every chunk. Kept: an index costs more than a row.

        Raises CorruptError for a file or index that differs from the commit record.
        """
        if self._chunks is None:
            # Of a remote file this would be one more request, and its digest tells as well.
            if isinstance(self.file, Path) and os.fstat(self.descriptor).st_size != self._size:
                raise self.corrupt("its size differs from the commit record")
            offset, length, shape = self._place["offset"], self._place["length"], (self._rows, len(self.dtypes), 3)
            count = self._rows * len(self.dtypes) * 3
            kinds = {count * np.dtype(kind).itemsize + CHECKSUM_BYTES: kind for kind in ("<u4", "<u8")}
            # The length is compared before anything is read: a record may say any.
            stored = b""
            for fresh in (False, True) if length in kinds else ():
                stored = _read([self], [offset], [length], fresh=fresh)[0]
                if bytes_digest(stored) == self._place["sha256"] or isinstance(self.file, Path):
                    break
                self.discard_copy()
            if bytes_digest(stored) != self._place["sha256"]:
                raise self.corrupt("its index of chunks differs from the commit record")
            chunks = np.frombuffer(stored, kinds[length], count).reshape(shape)
            if (chunks[..., :2].sum(-1, dtype=np.uint64) > offset).any():
                raise self.corrupt("its index names chunks outside the file")
            self._chunks = chunks
        return self._chunks

    @property
    def descriptor(self) -> int:
        """An open descriptor of the file, on a local disk, for `os.pread`: a forked worker reads by its parent's.

        Raises CorruptError for a missing file.
        """
        known = self._opened.get("file")
        if known is None:
            try:
                descriptor = os.open(str(self.file), os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise self.corrupt("the file is missing") from error
            known = self._opened.setdefault("file", descriptor)
            if known != descriptor:
                os.close(descriptor)  # another thread was first
        return known

    def open_copy(self) -> int | None:
        """A new descriptor of a copy of the file on this machine, None where there is none now."""
        for copy in self._copies:
            with suppress(OSError):
                return os.open(copy, os.O_RDONLY)
        return None

    def discard_copy(self) -> None:
        """Delete the whole copy, which was found to be damaged."""
        for copy in self._copies[:1]:
            copy.unlink(missing_ok=True)

    def ranges(self, rows: RowIndices) -> list[tuple[int, bytes]]:
        """(place in the file, bytes) of everything that rows of the shard need, unchecked but for the index."""
        offsets, lengths, _ = self.chunks[rows].reshape(-1, 3).T.tolist()
        index = self._place["offset"], with_checksum(self.chunks.tobytes())
        return [index, *zip(offsets, _read([self] * len(offsets), offsets, lengths), strict=True)]

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        descriptor = self._opened.pop("file", None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def decompress(self, chunk: bytes, row: int, name: str, out: Array) -> int:
        """An `arrays.Compressed`, given a chunk with a valid checksum, its row and its array.

        Raises CorruptError for a chunk that does not decompress.
        """
        try:
            # The decoder ignores the checksum: the compressed bytes contain their length.
            progress = standalone.simple_decompress_into(chunk, out)
        except Exception as error:
            raise self.corrupt(f"{name} of row {row} does not decompress ({error})") from error
        return int(progress.n_processed) + (not progress.finished)

    def corrupt(self, what: str) -> CorruptError:
        """The error for a file that differs from what was written."""
        return CorruptError(f"{self.file}: {what}: run `logit-cache verify --repair` and then `cache` to refill it")


def read_rows(wanted: Sequence[tuple[ShardReader, int]], names: Sequence[str] | None = None) -> StoredRows:
    """The stored rows (reader, row in its shard), from one or several shards of one cache, in that order.

    `names`: the arrays to read, by default all.

    Raises CorruptError naming the file for missing or damaged bytes.
    """
    if not wanted:
        return {}
    # Operations on whole lists: a few Python statements per chunk would take as long as reading the chunk.
    dtypes = wanted[0][0].dtypes
    places = np.stack([reader.chunks[row] for reader, row in wanted])
    if names is not None:
        places = places[:, [list(dtypes).index(name) for name in names]]
        dtypes = {name: dtypes[name] for name in names}
    offsets, lengths, checksums = places.reshape(-1, 3).T.tolist()
    readers = [reader for reader, _ in wanted for _ in dtypes]
    chunks = _read(readers, offsets, lengths)
    bad = _differing(chunks, lengths, checksums)
    if bad and isinstance(readers[0].file, RemotePath):
        # A copy may lack these chunks, and an answer of the store may have been damaged on its way.
        of_bad = [readers[place] for place in bad]
        again = _read(of_bad, [offsets[place] for place in bad], [lengths[place] for place in bad], fresh=True)
        for place, chunk in zip(bad, again, strict=True):
            chunks[place] = chunk
            readers[place].discard_copy()
        bad = _differing(chunks, lengths, checksums)
    if bad:
        slot, array = divmod(bad[0], len(dtypes))
        reader, row = wanted[slot]
        raise reader.corrupt(f"the checksum of {list(dtypes)[array]} of row {row} differs from what was written")
    stored: StoredRows = {}
    for number, (name, dtype) in enumerate(dtypes.items()):
        column = chunks[number :: len(dtypes)]
        if dtype is None:
            stored[name] = [
                partial(reader.decompress, chunk, row, name)
                for chunk, (reader, row) in zip(column, wanted, strict=True)
            ]
        else:
            size = dtype.itemsize
            stored[name] = [np.frombuffer(chunk, dtype, (len(chunk) - CHECKSUM_BYTES) // size) for chunk in column]
    return stored


def _differing(chunks: list[bytes], lengths: list[int], checksums: list[int]) -> list[int]:
    """Places of the chunks that are not what the index says."""
    last_words = [int.from_bytes(chunk[-CHECKSUM_BYTES:], "little") for chunk in chunks]
    # One number checks a chunk together with its checksum, without a copy of the chunk.
    read = [list(map(len, chunks)), last_words, list(map(google_crc32c.value, chunks))]
    written = [lengths, checksums, [_CHECKSUM_OF_CHECKED] * len(chunks)]
    if read == written:
        return []
    facts = enumerate(zip(zip(*read, strict=True), zip(*written, strict=True), strict=True))
    return [place for place, (one, other) in facts if one != other]


def _read(readers: list[ShardReader], offsets: list[int], lengths: list[int], *, fresh: bool = False) -> list[bytes]:
    """A range of the file of each reader, shorter where the file ends; `fresh`: not of a copy.

    Raises CorruptError for a missing file.
    """
    if isinstance(readers[0].file, Path):
        return list(map(os.pread, [reader.descriptor for reader in readers], lengths, offsets))
    found = [b""] * len(readers) if fresh else _read_copies(readers, offsets, lengths)
    absent = [place for place, chunk in enumerate(found) if not chunk]
    if not absent:
        return found
    files = [reader.file for reader in (readers[place] for place in absent) if isinstance(reader.file, RemotePath)]
    try:
        read = read_ranges(files, [offsets[place] for place in absent], [lengths[place] for place in absent])
    except FileNotFoundError as error:
        raise next((reader for reader in readers if not reader.file.exists()), readers[0]).corrupt(
            "the file is missing"
        ) from error
    for place, chunk in zip(absent, read, strict=True):
        found[place] = chunk
    return found


def _read_copies(readers: list[ShardReader], offsets: list[int], lengths: list[int]) -> list[bytes]:
    """The same of copies on this machine, empty where there is none. Files are not kept open: a copy that is deleted
    meanwhile would still take its room."""
    descriptors = {reader: reader.open_copy() for reader in dict.fromkeys(readers)}
    try:
        places = zip([descriptors[reader] for reader in readers], lengths, offsets, strict=True)
        return [b"" if file is None else os.pread(file, length, offset) for file, length, offset in places]
    finally:
        for file in descriptors.values():
            if file is not None:
                os.close(file)
