"""One shard on disk: a Zarr v3 group whose arrays are each one file, one chunk per row.

Written by zarr-python and readable by it. Reading during training goes through `ShardReader`, which reads the same files
with one `pread` per row, keeps the chunk index in memory, checks the crc32c of every chunk, and is safe in forked
workers.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.pcodec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from pipeline.codec import Arrays, TargetCodec
from pipeline.errors import CorruptError

# delta order 0: the values as they are. ("none" means the same and fails with pcodec 1.1.)
PCODEC: dict[str, Any] = {
    "level": 8,
    "mode_spec": "classic",
    "delta_spec": "try_consecutive",
    "delta_encoding_order": 0,
}
CHUNK_CODECS: list[dict[str, Any]] = [{"name": "numcodecs.pcodec", "configuration": PCODEC}, {"name": "crc32c"}]

_INDEX_ENTRY = 16  # two little-endian uint64 per chunk: offset, length
_CHECKSUM = 4


def write_group(path: Path, arrays: Arrays) -> None:
    """Write arrays [rows, positions, entries] as one Zarr group, one shard file each."""
    with warnings.catch_warnings():
        # zarr warns that numcodecs codecs are not part of the v3 core specification; the manifest records them.
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w", zarr_format=3)
        for name, values in arrays.items():
            rows, positions, entries = values.shape
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(1, positions, entries),
                shards=(rows, positions, entries),
                filters=None,
                serializer=PCodec(**PCODEC),
                compressors=[Crc32cCodec()],
                dimension_names=["row", "position", "entry"],
                fill_value=0,
                config={"write_empty_chunks": True},
            )
            array[:] = values


def array_file(name: str) -> str:
    """Path inside the group of the one file that holds an array."""
    return f"{name}/c/0/0/0"


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

    def __init__(self, path: Path, codec: TargetCodec, rows: int, row_length: int, files: dict[str, dict[str, Any]]):
        """`files` are those of the commit record: size and chunk digest of every array file."""
        self._path, self._codec, self._rows, self._row_length, self._files = path, codec, rows, row_length, files
        self._open: dict[str, tuple[int, np.ndarray[Any, np.dtype[np.uint64]]]] = {}
        self._pid = os.getpid()
        self._pcodec = numcodecs.pcodec.PCodec(**PCODEC)

    def read(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Arrays:
        """Arrays [len(rows), positions, entries]. Raises CorruptError naming the file for bytes that are not as written."""
        result: Arrays = {}
        for name, (dtype, entries) in self._codec.layout().items():
            out = np.empty((len(rows), self._row_length, entries), dtype)
            descriptor, index = self._handle(name)
            for slot, row in enumerate(rows):
                offset, length = int(index[row, 0]), int(index[row, 1])
                out[slot] = self._chunk(name, descriptor, int(row), offset, length, out[slot])
            result[name] = out
        return result

    def close(self) -> None:
        if self._pid == os.getpid():
            for descriptor, _ in self._open.values():
                os.close(descriptor)
        self._open = {}

    def _chunk(
        self, name: str, descriptor: int, row: int, offset: int, length: int, like: np.ndarray[Any, np.dtype[Any]]
    ) -> np.ndarray[Any, np.dtype[Any]]:
        data = os.pread(descriptor, length, offset)
        body, stored = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if len(data) != length or google_crc32c.value(body).to_bytes(4, "little") != stored:
            raise CorruptError(self._complaint(name, f"row {row} has another checksum than it was written with"))
        try:
            return np.asarray(self._pcodec.decode(body)).view(like.dtype).reshape(like.shape)
        except Exception as error:
            raise CorruptError(self._complaint(name, f"row {row} does not decode ({error})")) from error

    def _handle(self, name: str) -> tuple[int, np.ndarray[Any, np.dtype[np.uint64]]]:
        if self._pid != os.getpid():
            # A forked worker must not share file descriptors' lifetime with its parent.
            self._open, self._pid = {}, os.getpid()
        if name not in self._open:
            file = self._path / array_file(name)
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptError(self._complaint(name, "the file is missing")) from None
            expected = self._files.get(array_file(name), {})
            size = os.fstat(descriptor).st_size
            index, digest = _index_and_digest(descriptor, size, self._rows)
            if size != expected.get("size") or digest != expected.get("chunks_sha256"):
                os.close(descriptor)
                raise CorruptError(self._complaint(name, "size or chunks differ from the commit record"))
            self._open[name] = (descriptor, index)
        return self._open[name]

    def _complaint(self, name: str, what: str) -> str:
        return (
            f"{self._path / array_file(name)}: {what}: run `logit-cache verify --repair` and then `cache` to refill it"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
