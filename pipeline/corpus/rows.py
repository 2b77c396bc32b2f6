"""Packed rows on disk: token ids of equal length, with the document of each token, as Arrow.

`segment_ids` number the documents of a row, so that attention and positions restart at their boundaries. A third column
is `loss_mask` where the corpus marks the tokens to learn, or `labels` in rows for masked models (`masking`).

The directory opens with `datasets.load_from_disk`. Its `prepared.json` holds size and digest of every other file, and
`rows.crc32c` the crc32c of every row, which each read checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import pyarrow as pa

from ..base.durable import bytes_digest, file_digest, local_copy, parse_json, remove_tree
from ..base.errors import CorruptError, IncompleteError, StorageError
from ..base.places import Place, files_in
from ..recipe.paths import CachePaths
from .labels import COLUMNS, LABELS, LOSS_MASK, Columns, IntArray, labels_of, row_bytes
from .tokenizer import TOKENIZER

META = "prepared.json"
DATA = "data-00000-of-00001.arrow"
CHECKSUMS = "rows.crc32c"  # little-endian uint32 of each row
ROWS_PER_BATCH = 1024  # rows of an Arrow record batch
_REMEDY = "delete the corpus directory and run `prepare` again, which makes the same rows from the same text"
Int64Array = np.ndarray[Any, np.dtype[np.int64]]


class Prepared:
    """What is known of one corpus directory without its rows: `prepared.json` and the tokenizer.

    Of a remote directory, of a local copy of these files.
    """

    _reads_rows = False

    def __init__(self, path: Place) -> None:
        """Raises IncompleteError where nothing was prepared, CorruptError where a file differs from what `prepare`
        wrote, StorageError where the local copy cannot be written.
        """

        def needed(name: str) -> bool:
            return self._reads_rows or name == META or name.startswith(f"{TOKENIZER}/")

        def check(folder: Path, new: bool) -> dict[str, Any]:
            # In an existing copy, each read checks its rows.
            return _check_files(folder, shown=path, needed=needed, unread=() if new else (DATA,))

        self.path = path
        try:
            self.local = local_copy(path, META, check, needed, "" if self._reads_rows else TOKENIZER)
            self.stamp = bytes_digest((self.local / META).read_bytes())
            """Digest of `prepared.json`, which names the digest of every other file."""
            self.meta = check(self.local, False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error
        except OSError as error:
            if isinstance(path, Path):
                raise self._damaged(f"the corpus cannot be read ({error})") from error
            raise StorageError(
                f"{path}: its files cannot be copied to this machine ({error}): set LOGIT_CACHE_HOME to a directory for them"
            ) from error
        self.rows: int = self.meta["rows"]
        self.row_length: int = self.meta["row_length"]
        self.row_start: list[int] = self.meta.get("row_start", [])
        """The tokens with which rows begin that continue a document."""

    @classmethod
    def of_cache(cls, cache: Place) -> Self:
        """That of a cache."""
        return cls(CachePaths(cache).corpus)

    def _damaged(self, what: str) -> CorruptError:
        """The error for damaged rows. A damaged local copy is deleted, so that the next run makes a new one."""
        if isinstance(self.path, Path):
            return CorruptError(f"{self.path}: {what}: {_REMEDY}")
        remove_tree(self.local)
        return CorruptError(
            f"{self.path}: {what} in the local copy {self.local}, now deleted: run the same command again to make "
            "a new one"
        )


class PackedRows(Prepared):
    """The rows of one corpus directory, memory-mapped; of a remote directory, those of a local copy."""

    _reads_rows = True

    def __init__(self, path: Place) -> None:
        """Raises as `Prepared`."""
        super().__init__(path)
        try:
            with pa.memory_map(str(self.local / DATA)) as source:
                table = pa.ipc.open_stream(source).read_all()
            self.masked = LOSS_MASK in table.column_names
            """Whether rows carry a loss mask."""
            self.objective = "masked" if LABELS in table.column_names else "causal"
            """causal: labels are next tokens; masked: labels are hidden tokens."""
            self.column_names = next(
                (names for names in reversed(COLUMNS) if set(names) <= set(table.column_names)), COLUMNS[0]
            )
            self._columns = {
                name: [chunk.flatten().to_numpy().reshape(-1, self.row_length) for chunk in table[name].chunks]
                for name in self.column_names
            }
            sizes = {name: [len(chunk) for chunk in chunks] for name, chunks in self._columns.items()}
            self._checksums = np.fromfile(self.local / CHECKSUMS, "<u4")
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"the corpus cannot be read ({error})") from error
        expected = [min(ROWS_PER_BATCH, self.rows - first) for first in range(0, self.rows, ROWS_PER_BATCH)]
        if (
            table.num_rows != self.rows
            or len(self._checksums) != self.rows
            or any([size for size in found if size] != expected for found in sizes.values())
        ):
            raise self._damaged(f"{table.num_rows} rows where {self.rows} were prepared")

    def __reduce__(self) -> Any:
        """Another process opens the directory again: the rows would be copied to it otherwise."""
        return type(self), (self.path,)

    def take(self, rows: Int64Array) -> tuple[IntArray, IntArray]:
        """input_ids and segment_ids, both [len(rows), row_length] int32. Raises CorruptError for a damaged row."""
        columns = self.columns(rows)
        return columns["input_ids"], columns["segment_ids"]

    def labels(self, rows: Int64Array) -> Int64Array:
        """The labels of rows (`labels_of`)."""
        return labels_of(self.columns(rows))

    def examples(self, rows: Int64Array) -> tuple[IntArray, IntArray, Int64Array]:
        """`take` and `labels` in one read."""
        columns = self.columns(rows)
        return columns["input_ids"], columns["segment_ids"], labels_of(columns)

    def columns(self, rows: Int64Array) -> Columns:
        """All columns of rows. Raises CorruptError for a damaged row."""
        # The columns of a row are adjacent, since the checksum covers them in this order.
        taken = np.empty((len(rows), len(self._columns), self.row_length), "<i4")
        checksums = self._checksums[rows].tolist()
        for slot, row in enumerate(rows.tolist()):
            chunk, place = divmod(row, ROWS_PER_BATCH)
            for column, chunks in enumerate(self._columns.values()):
                taken[slot, column] = chunks[chunk][place]
            if row_checksum(taken[slot]) != checksums[slot]:
                raise self._damaged(f"row {row} differs from what `prepare` wrote")
        return dict(zip(self._columns, taken.swapaxes(0, 1), strict=True))

    def verify(self) -> None:
        """Check every byte where the rows lie. Raises CorruptError naming a damaged file."""
        _check_files(self.path, shown=self.path)

    def digest(self, start: int, stop: int) -> str:
        """sha256 of rows `start` to `stop` (`row_bytes`)."""
        sha = hashlib.sha256()
        for first in range(start, stop, ROWS_PER_BATCH):
            sha.update(row_bytes(self.columns(np.arange(first, min(first + ROWS_PER_BATCH, stop)))))
        return sha.hexdigest()


def row_checksum(columns_ML: IntArray) -> int:
    """crc32c of the columns [columns, L] of one row, in order."""
    return int(google_crc32c.value(np.ascontiguousarray(columns_ML, "<i4").tobytes()))


def _check_files(
    folder: Place,
    *,
    shown: Place,
    needed: Callable[[str], bool] = lambda name: True,
    unread: Collection[str] = (),
) -> dict[str, Any]:
    """Check the `needed` files of a corpus against its `prepared.json`, and return the latter; of those in `unread`, the
    size only.

    Errors call the directory `shown`. Raises FileNotFoundError where nothing was prepared, CorruptError naming a file
    that differs.
    """
    meta: dict[str, Any] = parse_json((folder / META).read_bytes(), shown / META, _REMEDY)
    try:
        expected = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in meta["files"].items()}
        whole = {DATA, CHECKSUMS} <= set(expected) and isinstance(meta["rows"], int) and meta["row_length"] > 0
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{shown / META}: not what `prepare` writes ({error!r}): {_REMEDY}") from error
    sizes = files_in(folder)  # there may be more: `datasets` stores its own cache files here
    expected = {name: facts for name, facts in expected.items() if needed(name)}
    missing = sorted(set(expected) - set(sizes))
    if not whole or missing:
        raise CorruptError(f"{shown}: files are missing ({', '.join(missing) or 'the rows'}): {_REMEDY}")
    for name, (size, digest) in expected.items():
        if sizes[name] != size or (name not in unread and file_digest(folder / name) != digest):
            raise CorruptError(f"{shown / name}: differs from what `prepare` wrote: {_REMEDY}")
    return meta
