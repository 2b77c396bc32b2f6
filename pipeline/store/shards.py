"""One shard on disk: a Zarr v3 group, one file per array, one chunk per row.

zarr-python writes it and can read it. Training reads through `read_rows`: one `pread` per row of a file, or one request
for neighbouring rows of a remote file; the crc32c of every chunk is checked against the commit record. It is safe in
forked workers. A `ShardReader` keeps the chunk index of its shard in memory.
"""

from __future__ import annotations

import base64
import binascii
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from pcodec import standalone
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from ..base.errors import CorruptError
from ..base.places import Place, RemotePath, files_in, read_ranges
from .arrays import Array, Arrays, StoredRows
from .signals import is_signal_array

# Delta order 0: values unchanged. ("none" means the same but fails with pcodec 1.1.)
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
"""The codecs of every chunk, by the profile of the cache."""
INDEX_BYTES = 12
"""Memory of one entry of a reader's chunk index."""
_INDEX_ENTRY = 16  # two little-endian uint64 per chunk: offset, length
_CHECKSUM = 4
_CHECKSUM_OF_CHECKED = 0x48674BC7
"""The crc32c of any bytes followed by their own crc32c, little-endian."""


def write_group(path: Path, arrays: Arrays, profile: str) -> None:
    """Write arrays [row, ...] as one Zarr group: one shard file per array, one chunk per row."""
    with warnings.catch_warnings():
        # zarr warns of numcodecs codecs, which the core specification of v3 lacks; the manifest records them.
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
    """Whether an array is stored uncompressed: every array of `fast`, and signals, which do not compress."""
    return profile == "fast" or is_signal_array(name)


def read_group(path: Path) -> Arrays:
    """All arrays of a group, by zarr-python. Raises zarr's errors for missing or damaged files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="r")
        return {name: np.asarray(array[:]) for name, array in group.arrays()}


def array_file(name: str, files: Iterable[str]) -> str | None:
    """The file of an array among those of a group, None if there is none; its path depends on the number of axes."""
    return next((file for file in files if file.startswith(f"{name}/c/")), None)


def chunk_checksums(data: bytes, rows: int) -> str | None:
    """The crc32c of every chunk of a shard file, as in a commit record: base64 of little-endian uint32 [rows].

    None for bytes that are no shard file. The checksums tie every chunk to the record; without them, another file with
    the same sizes and valid checksums of its own would be accepted.
    """
    index = _index(data[-(rows * _INDEX_ENTRY + _CHECKSUM) :], rows)
    if index is None:
        return None
    ends = [int(offset) + int(length) for offset, length in index]
    return base64.b64encode(b"".join(data[end - _CHECKSUM : end] for end in ends)).decode()


def _index(stored: bytes, rows: int) -> np.ndarray[Any, np.dtype[np.uint64]] | None:
    """The chunk index [rows, 2] (offset, length), None for bytes that are no index."""
    body, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
    if len(body) != rows * _INDEX_ENTRY or google_crc32c.value(body).to_bytes(_CHECKSUM, "little") != checksum:
        return None
    return np.frombuffer(body, "<u8").reshape(rows, 2)


class ShardReader:
    """The files of one shard and their chunk index; `read_rows` reads rows through it."""

    def __init__(self, path: Place, layout: dict[str, str], profile: str, rows: int, files: dict[str, dict[str, Any]]):
        """`layout`: name -> dtype of the arrays; `files`: the files of the commit record."""
        self._path, self._rows, self._record = path, rows, files
        self._names = {name: array_file(name, files) or name for name in layout}
        """Array -> its file in the shard."""
        self.dtypes = {name: np.dtype(dtype) if _plain(name, profile) else None for name, dtype in layout.items()}
        """Array -> dtype of its chunks; None where they are compressed."""
        self.files: list[Place] = [path / file for file in self._names.values()]
        self._descriptors: list[int] = []
        self._chunks: np.ndarray[Any, np.dtype[Any]] | None = None

    @property
    def indexed(self) -> bool:
        """Whether the chunk index is in memory."""
        return self._chunks is not None

    @property
    def chunks(self) -> np.ndarray[Any, np.dtype[Any]]:
        """[rows, arrays, 3] offset, length and crc32c of every chunk. Kept: an index costs more than a row.

        Raises CorruptError for files that differ from the commit record.
        """
        if self._chunks is None:
            self._chunks = self._read_indexes()
            self._record = {}  # no longer needed, and as large as the index
        return self._chunks

    @property
    def descriptors(self) -> list[int]:
        """Open descriptors of the files, on a local disk, for `os.pread`: a forked worker reads by its parent's.

        Raises CorruptError for a missing file.
        """
        if not self._descriptors:
            with ExitStack() as opened:
                found = []
                for file in self.files:
                    try:
                        found.append(os.open(str(file), os.O_RDONLY))
                    except (FileNotFoundError, NotADirectoryError) as error:
                        raise self.missing() from error
                    opened.callback(os.close, found[-1])
                opened.pop_all()
            self._descriptors = found
        return self._descriptors

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": []}

    def _read_indexes(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Read the chunk indexes of all arrays at once."""
        sizes = self._sizes()
        chunks = np.empty((self._rows, len(sizes), 3), np.uint32 if max(sizes) < 2**32 else np.uint64)
        for number, (name, size) in enumerate(zip(self.dtypes, sizes, strict=True)):
            expected = self._record.get(self._names[name], {})
            try:
                checksums = base64.b64decode(expected["crc32c"], validate=True)
            except (KeyError, TypeError, binascii.Error):
                checksums = b""
            if size != expected.get("size") or len(checksums) != self._rows * _CHECKSUM:
                raise self.corrupt(name, "size or chunks differ from the commit record")
            chunks[:, number, 2] = np.frombuffer(checksums, "<u4")
        length = self._rows * _INDEX_ENTRY + _CHECKSUM
        ends = _read([self], [max(size - length, 0) for size in sizes], [length] * len(sizes))
        for number, (name, size, stored) in enumerate(zip(self.dtypes, sizes, ends, strict=True)):
            index = _index(stored, self._rows)
            if index is None or (index > size).any() or (index.sum(-1) > size - length).any():
                raise self.corrupt(name, "its index of chunks is damaged")
            chunks[:, number, :2] = index
        return chunks

    def _sizes(self) -> list[int]:
        """Size of each file in bytes. Raises CorruptError for a missing file."""
        if isinstance(self._path, Path):
            return [os.fstat(descriptor).st_size for descriptor in self.descriptors]
        found = files_in(self._path)
        if not found.keys() >= set(self._names.values()):
            raise self.missing()
        return [found[file] for file in self._names.values()]

    def decompress(self, chunk: bytes, row: int, name: str, out: Array) -> int:
        """An `arrays.Compressed`, given a chunk with a valid checksum, its row and its array.

        Raises CorruptError for a chunk that does not decompress.
        """
        try:
            # The decoder ignores the checksum: the compressed bytes contain their length.
            progress = standalone.simple_decompress_into(chunk, out)
        except Exception as error:
            raise self.corrupt(name, f"row {row} does not decompress ({error})") from error
        return int(progress.n_processed) + (not progress.finished)

    def lost(self) -> list[str]:
        """Arrays without a file."""
        present = files_in(self._path)
        return [name for name, file in self._names.items() if file not in present]

    def missing(self) -> CorruptError:
        """The error for a missing file; it names the first one."""
        return self.corrupt((self.lost() or list(self._names))[0], "the file is missing")

    def corrupt(self, name: str, what: str) -> CorruptError:
        """The error for an array that differs from what was written."""
        file = self._path / self._names[name]
        return CorruptError(f"{file}: {what}: run `logit-cache verify --repair` and then `cache` to refill it")


def read_rows(wanted: Sequence[tuple[ShardReader, int]]) -> StoredRows:
    """The stored rows (reader, row in its shard), from one or several shards of one cache, in that order.

    Raises CorruptError naming the file for missing or damaged bytes.
    """
    if not wanted:
        return {}
    # Operations on whole lists: a few Python statements per chunk would take as long as reading the chunk.
    places = np.concatenate([reader.chunks[row] for reader, row in wanted])
    offsets, lengths, checksums = places.T.tolist()
    chunks = _read([reader for reader, _ in wanted], offsets, lengths)
    last_words = [int.from_bytes(chunk[-_CHECKSUM:], "little") for chunk in chunks]
    # One number checks a chunk together with its checksum, without a copy of the chunk.
    read = [list(map(len, chunks)), last_words, list(map(google_crc32c.value, chunks))]
    written = [lengths, checksums, [_CHECKSUM_OF_CHECKED] * len(chunks)]
    dtypes = wanted[0][0].dtypes
    if read != written:
        facts = enumerate(zip(zip(*read, strict=True), zip(*written, strict=True), strict=True))
        slot, array = divmod(next(place for place, (one, other) in facts if one != other), len(dtypes))
        reader, row = wanted[slot]
        raise reader.corrupt(list(dtypes)[array], f"the checksum of row {row} differs from the commit record")
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
            stored[name] = [np.frombuffer(chunk, dtype, (len(chunk) - _CHECKSUM) // size) for chunk in column]
    return stored


def _read(readers: list[ShardReader], offsets: list[int], lengths: list[int]) -> list[bytes]:
    """One range of each file of each reader, shorter where the file ends. Raises CorruptError for a missing file."""
    files = [file for reader in readers for file in reader.files if isinstance(file, RemotePath)]
    if not files:
        descriptors = [descriptor for reader in readers for descriptor in reader.descriptors]
        return list(map(os.pread, descriptors, lengths, offsets))
    try:
        return read_ranges(files, offsets, lengths)
    except FileNotFoundError as error:
        raise next((reader for reader in readers if reader.lost()), readers[0]).missing() from error
