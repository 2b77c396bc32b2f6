"""One shard on disk: a Zarr v3 group whose arrays are each one file, one chunk per row.

Written by zarr-python and readable by it. Reading during training goes through `ShardReader`, which reads the same files
with one `pread` per row, or near rows of a remote file with one request, keeps the chunk index in memory, checks the crc32c
of every chunk against the commit record, and is safe in forked workers.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from pcodec import standalone
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from pipeline.codec import Array, Arrays, Stored, Values
from pipeline.errors import CorruptError
from pipeline.storage import OpenFiles, Place

# delta order 0: the values as they are. ("none" means the same and fails with pcodec 1.1.)
PCODEC: dict[str, Any] = {
    "level": 8,
    "mode_spec": "classic",
    "delta_spec": "try_consecutive",
    "delta_encoding_order": 0,
}
CHUNK_CODECS: dict[str, list[dict[str, Any]]] = {
    "compact": [{"name": "numcodecs.pcodec", "configuration": PCODEC}, {"name": "crc32c"}],
    "fast": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
}
"""What every chunk went through, by the profile of the cache."""

_INDEX_ENTRY = 16  # two little-endian uint64 per chunk: offset, length
_CHECKSUM = 4
_CHECKSUM_OF_CHECKED = 0x48674BC7
"""The crc32c of any bytes that end with their own crc32c, little-endian."""


def write_group(path: Path, arrays: Arrays, profile: str) -> None:
    """Write arrays [row, ...] as one Zarr group: one shard file each, one chunk a row."""
    with warnings.catch_warnings():
        # zarr warns that numcodecs codecs are not part of the v3 core specification; the manifest records them.
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w", zarr_format=3)
        for name, values in arrays.items():
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(1, *values.shape[1:]),
                shards=values.shape,
                filters=None,
                serializer=BytesCodec(endian="little") if _plain(name, profile) else PCodec(**PCODEC),
                compressors=[Crc32cCodec()],
                fill_value=0,
                config={"write_empty_chunks": True},
            )
            array[:] = values


def _plain(name: str, profile: str) -> bool:
    """Whether an array's bytes are stored as they are: all in `fast`, and signals, which do not compress."""
    return profile == "fast" or "." in name


def read_group(path: Path) -> Arrays:
    """All arrays of a group, by zarr-python. Raises what zarr raises for files that are missing or damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="r")
        return {name: np.asarray(array[:]) for name, array in group.arrays()}


def array_file(name: str, files: Iterable[str]) -> str | None:
    """Which of a group's files holds an array: the one shard file, whose path depends on the number of axes."""
    return next((file for file in files if file.startswith(f"{name}/c/")), None)


def chunk_checksums(data: bytes, rows: int) -> str | None:
    """The crc32c of every chunk of a shard file, None for bytes that are none, as the commit record keeps them: base64 of little-endian uint32 [rows].

    They tie every chunk to the record: a file with the same sizes and valid checksums of its own would else pass for this.
    """
    index = _index(data[-(rows * _INDEX_ENTRY + _CHECKSUM) :], rows)
    if index is None:
        return None
    ends = [int(offset) + int(length) for offset, length in index]
    return base64.b64encode(b"".join(data[end - _CHECKSUM : end] for end in ends)).decode()


def _index(stored: bytes, rows: int) -> np.ndarray[Any, np.dtype[np.uint64]] | None:
    """The chunk index [rows, 2] (offset, length), None for bytes that are not one."""
    body, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
    if len(body) != rows * _INDEX_ENTRY or google_crc32c.value(body).to_bytes(_CHECKSUM, "little") != checksum:
        return None
    return np.frombuffer(body, "<u8").reshape(rows, 2)


class ShardReader:
    """Random rows of one shard."""

    def __init__(self, path: Place, layout: dict[str, str], profile: str, rows: int, files: dict[str, dict[str, Any]]):
        """`layout` names the arrays with their dtypes; `files` are those of the commit record."""
        self._path, self._layout, self._profile, self._rows, self._files = path, layout, profile, rows, files
        self._open = OpenFiles(path)
        self._chunks: np.ndarray[Any, np.dtype[Any]] | None = None
        """[rows, arrays, 3] offset, length and crc32c of every chunk. Kept for good: looking them up costs more than reading a row."""
        self._names = {name: inside for name in layout if (inside := array_file(name, files)) is not None}
        self._arrays = [
            (self._names.get(name, name), name, np.dtype(dtype) if _plain(name, profile) else None)
            for name, dtype in layout.items()
        ]
        """What there is in a row: its file, its name, and its dtype where the bytes are stored as they are."""

    def read(self, rows: list[int]) -> list[list[Stored]]:
        """What is stored of each row, in the order of `layout`. Raises CorruptError naming the file for bytes that are not as
        written.
        """
        if self._chunks is None:
            self._chunks = self._read_indexes()
            self._files = {}  # as large as what was made of it
        places = self._chunks[rows].tolist()
        ranges = [
            (file, offset, length)
            for of_row in places
            for (file, _, _), (offset, length, _) in zip(self._arrays, of_row, strict=True)
        ]
        try:
            chunks = iter(self._open.read(ranges))
        except FileNotFoundError as error:
            raise CorruptError(self._complaint(next(iter(self._layout)), "the file is missing")) from error
        found = []
        for row, of_row in zip(rows, places, strict=True):
            stored: list[Stored] = []
            for (_, name, dtype), (_, length, checksum) in zip(self._arrays, of_row, strict=True):
                chunk = next(chunks)
                # A chunk and its checksum are judged by one number, without a copy of the chunk.
                if (
                    len(chunk) != length
                    or int.from_bytes(chunk[-_CHECKSUM:], "little") != checksum
                    or google_crc32c.value(chunk) != _CHECKSUM_OF_CHECKED
                ):
                    what = f"row {row} has another checksum than it was written with"
                    raise CorruptError(self._complaint(name, what))
                if dtype is None:
                    stored.append(_Compressed(chunk, self, name, row))
                else:
                    stored.append(Values(np.frombuffer(chunk, dtype, (length - _CHECKSUM) // dtype.itemsize)))
            found.append(stored)
        return found

    def close(self) -> None:
        """Close the files until the next look at them."""
        self._open.close()

    def _read_indexes(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Of all arrays at once: where the chunks of each row lie."""
        sizes = self._open.sizes([self._file(name) for name in self._layout])
        narrow = all(size is None or size < 2**32 for size in sizes)
        chunks = np.empty((self._rows, len(self._layout), 3), np.uint32 if narrow else np.uint64)
        for number, (name, size) in enumerate(zip(self._layout, sizes, strict=True)):
            expected = self._files[self._file(name)]
            try:
                checksums = base64.b64decode(expected["crc32c"], validate=True)
            except (KeyError, TypeError, binascii.Error):
                checksums = b""
            if size is None:
                raise CorruptError(self._complaint(name, "the file is missing"))
            if size != expected.get("size") or len(checksums) != self._rows * _CHECKSUM:
                raise CorruptError(self._complaint(name, "size or chunks differ from the commit record"))
            chunks[:, number, 2] = np.frombuffer(checksums, "<u4")
        length = self._rows * _INDEX_ENTRY + _CHECKSUM
        ends = [int(self._files[self._file(name)]["size"]) for name in self._layout]
        places = [
            (self._file(name), max(end - length, 0), length) for name, end in zip(self._layout, ends, strict=True)
        ]
        for number, (name, end, stored) in enumerate(zip(self._layout, ends, self._open.read(places), strict=True)):
            index = _index(stored, self._rows)
            if index is None or (index > end).any() or (index.sum(-1) > end - length).any():
                raise CorruptError(self._complaint(name, "its index of chunks is damaged"))
            chunks[:, number, :2] = index
        return chunks

    def _file(self, name: str) -> str:
        if name not in self._names:
            raise CorruptError(self._complaint(name, "the commit record does not name its file"))
        return self._names[name]

    def _complaint(self, name: str, what: str) -> str:
        file = self._path / self._names.get(name, name)
        return f"{file}: {what}: run `logit-cache verify --repair` and then `cache` to refill it"


class _Compressed:
    """A chunk with the right checksum, decompressed where it is wanted."""

    __slots__ = ("_chunk", "_name", "_reader", "_row")

    def __init__(self, chunk: bytes, reader: ShardReader, name: str, row: int) -> None:
        self._chunk, self._reader, self._name, self._row = chunk, reader, name, row

    def fill(self, out: Array) -> int:
        """Raises CorruptError for bytes that do not decode."""
        try:
            # The checksum behind the compressed bytes is not looked at: they say where they end.
            progress = standalone.simple_decompress_into(self._chunk, out)
        except Exception as error:
            raise CorruptError(
                self._reader._complaint(self._name, f"row {self._row} does not decode ({error})")
            ) from error
        return int(progress.n_processed) + (not progress.finished)
