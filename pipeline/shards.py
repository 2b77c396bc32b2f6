"""One shard on disk: a Zarr v3 group whose arrays are each one file, one chunk per row.

Written by zarr-python and readable by it. Reading during training goes through `ShardReader`, which reads the same files
with one `pread` per row, keeps the chunk index in memory, checks the crc32c of every chunk, and is safe in forked
workers.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.pcodec
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from pipeline.codec import Arrays, Rows
from pipeline.errors import CorruptError

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


def chunks_digest(path: Path, rows: int) -> str:
    """Digest of a shard file's chunk index and chunk checksums: it ties every chunk to the commit record."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _index_and_digest(descriptor, os.fstat(descriptor).st_size, rows)[1]
    finally:
        os.close(descriptor)


def _index_and_digest(descriptor: int, size: int, rows: int) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], str]:
    """The chunk index [rows, 2] (offset, length) and its digest. A short or wild index gives a digest like no other."""
    index_bytes = rows * _INDEX_ENTRY
    stored = os.pread(descriptor, index_bytes + _CHECKSUM, max(size - index_bytes - _CHECKSUM, 0))
    sha = hashlib.sha256(stored)
    index = np.zeros((rows, 2), "<u8")
    if len(stored) == index_bytes + _CHECKSUM:
        index = np.frombuffer(stored[:-_CHECKSUM], "<u8").reshape(rows, 2)
        for end in (int(offset) + int(length) for offset, length in index):
            if _CHECKSUM <= end <= size:
                sha.update(os.pread(descriptor, _CHECKSUM, end - _CHECKSUM))
    return index, sha.hexdigest()


class ShardReader:
    """Random rows of one shard."""

    def __init__(self, path: Path, layout: dict[str, str], profile: str, rows: int, files: dict[str, dict[str, Any]]):
        """`layout` names the arrays with their dtypes; `files` are those of the commit record."""
        self._path, self._layout, self._profile, self._rows, self._files = path, layout, profile, rows, files
        self._open: dict[str, tuple[int, np.ndarray[Any, np.dtype[np.uint64]]]] = {}
        self._pid = os.getpid()
        self._pcodec = numcodecs.pcodec.PCodec(**PCODEC)

    def read(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
        """The stored values of each row, flat. Raises CorruptError naming the file for bytes that are not as written."""
        result: Rows = {}
        for name, dtype in self._layout.items():
            descriptor, index = self._handle(name)
            result[name] = [
                self._chunk(name, descriptor, int(row), int(index[row, 0]), int(index[row, 1])).view(dtype)
                for row in rows
            ]
        return result

    def close(self) -> None:
        if self._pid == os.getpid():
            for descriptor, _ in self._open.values():
                os.close(descriptor)
        self._open = {}

    def _chunk(self, name: str, descriptor: int, row: int, offset: int, length: int) -> np.ndarray[Any, np.dtype[Any]]:
        data = os.pread(descriptor, length, offset)
        body, stored = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if len(data) != length or google_crc32c.value(body).to_bytes(4, "little") != stored:
            raise CorruptError(self._complaint(name, f"row {row} has another checksum than it was written with"))
        if _plain(name, self._profile):
            return np.frombuffer(body, np.uint8)
        try:
            return np.asarray(self._pcodec.decode(body))
        except Exception as error:
            raise CorruptError(self._complaint(name, f"row {row} does not decode ({error})")) from error

    def _handle(self, name: str) -> tuple[int, np.ndarray[Any, np.dtype[np.uint64]]]:
        if self._pid != os.getpid():
            # A forked worker must not share file descriptors' lifetime with its parent.
            self._open, self._pid = {}, os.getpid()
        if name not in self._open:
            inside = array_file(name, self._files)
            if inside is None:
                raise CorruptError(self._complaint(name, "the commit record does not name its file"))
            try:
                descriptor = os.open(self._path / inside, os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptError(self._complaint(name, "the file is missing")) from None
            expected = self._files[inside]
            size = os.fstat(descriptor).st_size
            index, digest = _index_and_digest(descriptor, size, self._rows)
            if size != expected.get("size") or digest != expected.get("chunks_sha256"):
                os.close(descriptor)
                raise CorruptError(self._complaint(name, "size or chunks differ from the commit record"))
            self._open[name] = (descriptor, index)
        return self._open[name]

    def _complaint(self, name: str, what: str) -> str:
        file = self._path / (array_file(name, self._files) or name)
        return f"{file}: {what}: run `logit-cache verify --repair` and then `cache` to refill it"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
