"""Packed rows on disk: token ids of equal length, with the document of each token, as Arrow.

`segment_ids` number the documents of a row, so that attention and positions restart at their boundaries. A third column
is `loss_mask` where the corpus marks the tokens to learn, or `labels` in rows for masked models (`masking`).

The directory opens with `datasets.load_from_disk` (`corpus_files` has its files). Every read checks the crc32c of its
rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from ..base.durable import bytes_digest, file_digest, local_copy, parse_json, remove_tree
from ..base.errors import CorruptError, IncompleteError, StorageError
from ..base.places import Place, files_in
from ..recipe.paths import CachePaths
from .corpus_files import DATA_NAME, META, PORTIONS
from .labels import COLUMNS, LABELS, LOSS_MASK, Columns, IntArray, labels_of, row_bytes
from .row_file import ROWS_PER_BATCH, StoredRows
from .tokenizer import TOKENIZER

_OPEN_FILES = 64
"""Files of rows that are mapped at the same time."""
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
            return _check_files(folder, shown=path, needed=needed, rows=self._reads_rows, whole=new)

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
            self._portions = json.loads((self.local / PORTIONS).read_bytes())
            self._firsts = np.cumsum([0, *(portion["rows"] for portion in self._portions)])
        except (OSError, ValueError) as error:
            raise self._damaged(f"the corpus cannot be read ({error})") from error
        if self._firsts[-1] != self.rows:
            raise self._damaged(f"{self._firsts[-1]} rows where {self.rows} were prepared")
        self._files: dict[int, StoredRows] = {}
        third = self._file(0).third
        self.masked = third == LOSS_MASK
        """Whether rows carry a loss mask."""
        self.objective = "masked" if third == LABELS else "causal"
        """causal: labels are next tokens; masked: labels are hidden tokens."""
        self.column_names = [*COLUMNS[0], *([third] if third is not None else [])]

    def _file(self, number: int) -> StoredRows:
        """The file of rows of this number. Raises CorruptError for one that does not hold its rows."""
        found = self._files.get(number)
        if found is not None:
            return found
        portion = self._portions[number]
        try:
            found = StoredRows(self.local / portion["name"], portion["rows"], self.row_length)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"{portion['name']} cannot be read ({error})") from error
        if len(self._files) >= _OPEN_FILES:
            self._files = {}
        self._files[number] = found
        return found

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
        taken = np.empty((len(rows), len(self.column_names), self.row_length), "<i4")
        files = (np.searchsorted(self._firsts, rows, side="right") - 1).tolist()
        for slot, (row, number) in enumerate(zip(rows.tolist(), files, strict=True)):
            if not self._file(number).read(row - int(self._firsts[number]), taken[slot]):
                raise self._damaged(f"row {row} differs from what `prepare` wrote")
        return dict(zip(self.column_names, taken.swapaxes(0, 1), strict=True))

    def verify(self) -> None:
        """Check every byte where the rows lie. Raises CorruptError naming a damaged file."""
        _check_files(self.path, shown=self.path, rows=True, whole=True)

    def digest(self, start: int, stop: int) -> str:
        """sha256 of rows `start` to `stop` (`row_bytes`)."""
        sha = hashlib.sha256()
        for first in range(start, stop, ROWS_PER_BATCH):
            sha.update(row_bytes(self.columns(np.arange(first, min(first + ROWS_PER_BATCH, stop)))))
        return sha.hexdigest()


def _check_files(
    folder: Place, *, shown: Place, needed: Callable[[str], bool] = lambda name: True, rows: bool, whole: bool
) -> dict[str, Any]:
    """Check the `needed` files of a corpus against its `prepared.json`, and return the latter; with `rows` the files of
    rows too, by their size, or if `whole` every byte.

    Errors call the directory `shown`. Raises FileNotFoundError where nothing was prepared, CorruptError naming a file
    that differs.
    """
    meta: dict[str, Any] = parse_json((folder / META).read_bytes(), shown / META, _REMEDY)
    try:
        expected = _facts(meta["files"].items())
        complete = PORTIONS in expected and isinstance(meta["rows"], int) and meta["row_length"] > 0
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{shown / META}: not what `prepare` writes ({error!r}): {_REMEDY}") from error
    sizes = files_in(folder)  # there may be more: `datasets` stores its own cache files here
    if not complete:
        raise CorruptError(f"{shown}: files are missing (the rows): {_REMEDY}")
    _compare(folder, shown, {name: facts for name, facts in expected.items() if needed(name)}, sizes, True)
    if rows:
        portions = parse_json((folder / PORTIONS).read_bytes(), shown / PORTIONS, _REMEDY)
        try:
            files = _facts((portion["name"], portion) for portion in portions)
            good = bool(files) and all(map(DATA_NAME.fullmatch, files)) and all(p["rows"] >= 0 for p in portions)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptError(f"{shown / PORTIONS}: not what `prepare` writes ({error!r}): {_REMEDY}") from error
        if not good:
            raise CorruptError(f"{shown / PORTIONS}: not what `prepare` writes: {_REMEDY}")
        _compare(folder, shown, files, sizes, whole)
    return meta


def _facts(files: Iterable[tuple[str, Any]]) -> dict[str, tuple[int, str]]:
    """Name -> size and sha256."""
    return {str(name): (int(file["size"]), str(file["sha256"])) for name, file in files}


def _compare(
    folder: Place, shown: Place, expected: dict[str, tuple[int, str]], sizes: dict[str, int], whole: bool
) -> None:
    """Raises CorruptError for a file that is missing, or differs in size, or if `whole` in its bytes."""
    if missing := sorted(set(expected) - set(sizes)):
        raise CorruptError(f"{shown}: files are missing ({', '.join(missing)}): {_REMEDY}")
    for name, (size, digest) in expected.items():
        if sizes[name] != size or (whole and file_digest(folder / name) != digest):
            raise CorruptError(f"{shown / name}: differs from what `prepare` wrote: {_REMEDY}")
