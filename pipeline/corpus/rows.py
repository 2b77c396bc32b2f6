"""Packed rows on disk: token ids of equal length with the documents they come from, as Arrow.

`segment_ids` number the documents inside a row, so that attention and positions can restart at their boundaries. Where a corpus
says which tokens are to be learned there is a third column, `loss_mask`; rows for masked models are made by `masking` and have
`labels` instead.

On disk they are a directory that `datasets.load_from_disk` opens. `prepared.json` in it holds size and checksum of every
other file, and `rows.crc32c` the crc32c of every row, which is checked whenever a row is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pyarrow as pa

from ..base.durable import (
    bytes_digest,
    file_digest,
    local_copy,
    parse_json,
    remove_tree,
)
from ..base.errors import CorruptError, IncompleteError, StorageError
from ..base.places import Place, files_in

if TYPE_CHECKING:
    pass
from .labels import IntArray, next_token_labels

META = "prepared.json"
_ROWS_PER_BATCH = 1024
_DATA = "data-00000-of-00001.arrow"
_CHECKSUMS = "rows.crc32c"  # little-endian uint32 of each row
_REMEDY = "delete the corpus directory and run `prepare` again, which makes the same one of the same text"
_MASK = "loss_mask"
_LABELS = "labels"


class PackedRows:
    """The rows of one corpus directory, memory-mapped; those of a remote one in a local copy."""

    def __init__(self, path: Place) -> None:
        """Raises IncompleteError where nothing was prepared, CorruptError for files that are not as `prepare` left them.

        StorageError where there is no place for a copy.
        """

        def check(folder: Path, new: bool) -> dict[str, Any]:
            # Of a copy that was made before, the rows are checked as they are read.
            return _check_files(folder, shown=path, skip=None if new else _DATA)

        self.path = path
        try:
            self.local = local_copy(path, META, check)
            self.stamp = bytes_digest((self.local / META).read_bytes())
            """Digest of what was prepared, every file included."""
            self.meta = check(self.local, False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error
        except OSError as error:
            if isinstance(path, Path):
                raise self._damaged(f"the corpus cannot be read ({error})") from error
            raise StorageError(
                f"{path}: its rows cannot be copied to this machine ({error}): set LOGIT_CACHE_HOME to a directory for them"
            ) from error
        try:
            with pa.memory_map(str(self.local / _DATA)) as source:
                table = pa.ipc.open_stream(source).read_all()
            self.rows: int = table.num_rows
            self.row_length: int = self.meta["row_length"]
            self.masked = _MASK in table.column_names
            """Whether a loss mask says what is to be learned."""
            self.objective = "masked" if _LABELS in table.column_names else "causal"
            """What the labels are: the next token, or the one that a mask hides."""
            third = [name for name in (_MASK, _LABELS) if name in table.column_names]
            self._columns = {
                name: [chunk.flatten().to_numpy().reshape(-1, self.row_length) for chunk in table[name].chunks]
                for name in ("input_ids", "segment_ids", *third)
            }
            sizes = {name: [len(chunk) for chunk in chunks] for name, chunks in self._columns.items()}
            self._checksums = np.fromfile(self.local / _CHECKSUMS, "<u4")
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"the corpus cannot be read ({error})") from error
        whole = [_ROWS_PER_BATCH] * (self.rows // _ROWS_PER_BATCH)
        expected = [*whole, *([self.rows % _ROWS_PER_BATCH] if self.rows % _ROWS_PER_BATCH else [])]
        if (
            self.rows != self.meta["rows"]
            or len(self._checksums) != self.rows
            or any([size for size in found if size] != expected for found in sizes.values())
        ):
            raise self._damaged(f"{self.rows} rows where {self.meta['rows']} were prepared")

    def _damaged(self, what: str) -> CorruptError:
        """The error for rows that are not as they were prepared. A copy of them is removed, so that the next one is good."""
        if isinstance(self.path, Path):
            return CorruptError(f"{self.path}: {what}: {_REMEDY}")
        remove_tree(self.local)
        return CorruptError(
            f"{self.path}: {what} in the local copy {self.local}, which is now removed: run the same command again, which "
            "makes a new one"
        )

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[IntArray, IntArray]:
        """input_ids and segment_ids, both [len(rows), row_length] int32. Raises CorruptError for a damaged row."""
        columns = self._take(rows)
        return columns["input_ids"], columns["segment_ids"]

    def labels(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[len(rows), row_length]: what is to be predicted at each position, -100 where that is nothing.

        The next token of the same document, unless a loss mask leaves it out; in masked rows the token itself, where chosen.
        """
        return self._labels(self._take(rows))

    def examples(
        self, rows: np.ndarray[Any, np.dtype[np.int64]]
    ) -> tuple[IntArray, IntArray, np.ndarray[Any, np.dtype[np.int64]]]:
        """What `take` and `labels` give, read once."""
        columns = self._take(rows)
        return columns["input_ids"], columns["segment_ids"], self._labels(columns)

    def _labels(self, columns: dict[str, IntArray]) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.objective == "masked":
            return columns[_LABELS].astype(np.int64)
        return next_token_labels(columns["input_ids"], columns["segment_ids"], columns.get(_MASK))

    def _take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, IntArray]:
        # The columns of a row side by side, as the checksum goes over them.
        taken = np.empty((len(rows), len(self._columns), self.row_length), "<i4")
        checksums = self._checksums[rows].tolist()
        for slot, row in enumerate(rows.tolist()):
            chunk, place = divmod(row, _ROWS_PER_BATCH)
            for column, chunks in enumerate(self._columns.values()):
                taken[slot, column] = chunks[chunk][place]
            if _row_checksum(taken[slot]) != checksums[slot]:
                raise self._damaged(f"row {row} is not as it was prepared")
        return dict(zip(self._columns, taken.swapaxes(0, 1), strict=True))

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """sha256 of the rows' tokens and boundaries, and of the loss mask or labels where there are any."""
        sha = hashlib.sha256()
        for first in range(start, self.rows if stop is None else stop, _ROWS_PER_BATCH):
            rows = np.arange(first, min(first + _ROWS_PER_BATCH, self.rows if stop is None else stop))
            for part in self._take(rows).values():
                sha.update(np.ascontiguousarray(part, "<i4").tobytes())
        return sha.hexdigest()


def _row_checksum(columns_CL: IntArray) -> int:
    """crc32c of one row: its columns [C, L], one after the other."""
    return int(google_crc32c.value(np.ascontiguousarray(columns_CL, "<i4").tobytes()))


def _check_files(folder: Place, *, shown: Place, skip: str | None = None) -> dict[str, Any]:
    """Compare a corpus with its own `prepared.json`, all but the file `skip`, and return what that says.

    `shown` is what errors call it.

    Raises FileNotFoundError where nothing was prepared, CorruptError naming a file that is not as `prepare` left it.
    """
    meta: dict[str, Any] = parse_json((folder / META).read_bytes(), shown / META, _REMEDY)
    try:
        expected = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in meta["files"].items()}
        whole = {_DATA, _CHECKSUMS} <= set(expected) and isinstance(meta["rows"], int) and meta["row_length"] > 0
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{shown / META}: not what `prepare` writes ({error!r}): {_REMEDY}") from error
    sizes = files_in(folder)  # others may lie there too: `datasets` keeps what it computes beside its files
    missing = sorted(set(expected) - set(sizes))
    if not whole or missing:
        raise CorruptError(f"{shown}: files are missing ({', '.join(missing) or 'the rows'}): {_REMEDY}")
    for name, (size, digest) in expected.items():
        if sizes[name] != size or (name != skip and file_digest(folder / name) != digest):
            raise CorruptError(f"{shown / name}: not as it was prepared: {_REMEDY}")
    return meta


def verify_corpus(path: Place) -> None:
    """Check every byte of a corpus. Raises IncompleteError where there is none, CorruptError naming what is damaged."""
    try:
        _check_files(path, shown=path)
    except FileNotFoundError as error:
        raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error
