"""Packed rows on disk: token ids of equal length with the documents they come from, as Arrow.

`segment_ids` number the documents inside a row, so that attention and positions can restart at their boundaries. Where a corpus
says which tokens are to be learned there is a third column, `loss_mask`; rows for masked models are made by `masking` and have
`labels` instead.

On disk they are a directory that `datasets.load_from_disk` opens. `prepared.json` in it holds size and checksum of every
other file, and `rows.crc32c` the crc32c of every row, which is checked whenever a row is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pyarrow as pa

from pipeline.durable import (
    TEMPORARY,
    aside_of,
    bytes_digest,
    file_digest,
    json_digest,
    local_copy,
    parse_json,
    publish_directory,
    remove_tree,
)
from pipeline.errors import CorruptError, IncompleteError, StorageError
from pipeline.masking import PADDING, Framer, Masking, mask_rows
from pipeline.storage import Place, files_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
META = "prepared.json"
TOKENIZER = "tokenizer"  # what made the rows, kept beside them
_ROWS_PER_BATCH = 1024
_DATA = "data-00000-of-00001.arrow"
_CHECKSUMS = "rows.crc32c"  # little-endian uint32 of each row
_REMEDY = "delete the corpus directory and run `prepare` again, which makes the same one of the same text"
_MASK = "loss_mask"
_LABELS = "labels"

IntArray = np.ndarray[Any, np.dtype[np.int32]]


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


def next_token_labels(
    input_ids: IntArray, segment_ids: IntArray, loss_mask: IntArray | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """labels[..., t] = the token after t in the same document, -100 at row ends and document ends.

    With `loss_mask`, also -100 where that next token is not one to be learned (0).
    """
    labels = np.full(input_ids.shape, IGNORE, np.int64)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    if loss_mask is not None:
        same &= loss_mask[..., 1:] != 0
    labels[..., :-1] = np.where(same, input_ids[..., 1:], IGNORE)
    return labels


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, normalisation, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        # Truncation and padding are settings of a call, not of the tokenizer.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:
        definition = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"definition": definition, "specials": specials})


class RowWriter:
    """Packs tokens into rows and streams them to an Arrow file beside the final place."""

    def __init__(
        self,
        path: Place,
        row_length: int,
        limit: int | None = None,
        masked: bool = False,
        masking: Masking | None = None,
    ) -> None:
        """`masked` rows carry a loss mask; with `masking`, documents are framed and tokens hidden."""
        self.path, self._row_length, self._limit = path, row_length, limit
        self._masking = masking
        self._third = _LABELS if masking is not None else _MASK if masked else None
        # One name for all processes: what a killed one left is cleared away by the next.
        self.aside = path.with_name(path.name + TEMPORARY) if isinstance(path, Path) else aside_of(path)
        self._writer: Any = None
        self.committed_rows = 0
        self.restart()

    def restart(self) -> None:
        self.discard()
        self.aside.mkdir(parents=True)
        self._schema = _features(self._row_length, self._third)
        self._writer = pa.ipc.new_stream(str(self.aside / _DATA), self._schema)
        self._tokens = [np.empty(0, np.int32)]
        self._segments = [np.empty(0, np.int32)]
        self._masks = [np.empty(0, np.int32)]
        self._framer = Framer(self._row_length, self._masking) if self._masking is not None else None
        self._held = 0
        self._written = 0
        self._sha = hashlib.sha256()
        self._checksums: list[int] = []
        self.documents = self.tokens = 0

    @property
    def rows(self) -> int:
        return self._written + self._held // self._row_length

    @property
    def full(self) -> bool:
        return self._limit is not None and self.rows >= self._limit

    def add(self, tokens: IntArray, loss_mask: IntArray | None = None) -> None:
        """One document, joined to the one before. Without a mask all of its tokens are to be learned."""
        if self.full:
            return
        self.documents += 1
        self.tokens += len(tokens)
        loss_mask = np.ones(len(tokens), np.int32) if loss_mask is None else loss_mask
        if self._framer is None:
            self._append(tokens, np.full(len(tokens), self.documents, np.int32), loss_mask)
            return
        assert self._masking is not None
        for row, segments in self._framer.add(tokens):
            for _ in range(self._masking.draws):
                self._append(row, segments, np.ones(len(row), np.int32))
            if self.full:
                break

    def _append(self, *columns: IntArray) -> None:
        """Tokens, segments and loss mask [n], up to the limit of rows."""
        if self._limit is not None:
            room = (self._limit - self._written) * self._row_length - self._held
            columns = tuple(column[:room] for column in columns)
        for held, column in zip((self._tokens, self._segments, self._masks), columns, strict=True):
            held.append(column)
        self._held += len(columns[0])
        if self._held >= _ROWS_PER_BATCH * self._row_length:
            self._flush(_ROWS_PER_BATCH)

    def commit(self, settings: dict[str, Any]) -> None:
        self._flush(1)
        self._writer.close()
        self._writer = None
        self.committed_rows = self._written
        self.dropped = self._held
        meta = {
            "settings": settings,
            "rows": self._written,
            "row_length": self._row_length,
            "documents": self.documents,
            "digest": self._sha.hexdigest(),
        }
        features = _features_json(self._row_length, self._third)
        files = {
            "dataset_info.json": {"features": features},
            "state.json": {
                "_data_files": [{"filename": _DATA}],
                "_fingerprint": self._sha.hexdigest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            },
        }
        for name, value in files.items():
            (self.aside / name).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
        np.array(self._checksums, "<u4").tofile(self.aside / _CHECKSUMS)
        files_now = {
            name: {"size": size, "sha256": file_digest(self.aside / name)}
            for name, size in files_in(self.aside).items()
        }
        content = json.dumps({**meta, "files": files_now}, indent=1, sort_keys=True).encode()
        (self.aside / META).write_bytes(content)
        publish_directory(self.aside, self.path, last=META)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        shutil.rmtree(self.aside, ignore_errors=True)

    def _flush(self, multiple: int) -> None:
        """Write as many rows as are whole, in a multiple of `multiple`; keep the rest."""
        held = (self._tokens, self._segments, self._masks)
        columns = [np.concatenate(parts) for parts in held]
        whole = len(columns[0]) // self._row_length // multiple * multiple
        for first in range(0, whole, _ROWS_PER_BATCH):
            part = slice(first * self._row_length, min(first + _ROWS_PER_BATCH, whole) * self._row_length)
            self.write_rows(*(column[part].reshape(-1, self._row_length) for column in columns))
        used = whole * self._row_length
        self._held = len(columns[0]) - used
        for parts, column in zip(held, columns, strict=True):
            parts[:] = [column[used:]]

    def write_rows(self, tokens: IntArray, segments: IntArray, loss_mask: IntArray) -> None:
        """Ready rows [R, row_length], at most as many as one Arrow batch holds; all batches but the last must be full."""
        segments = np.where(segments == PADDING, PADDING, segments - segments[:, :1])  # numbered from 0 in every row
        third = loss_mask
        if self._masking is not None:
            tokens, third = mask_rows(tokens, self._written, self._masking)
        columns = [(tokens, pa.int32()), (segments, pa.int32())]
        if self._third is not None:
            columns.append((third, pa.int8() if self._third == _MASK else pa.int32()))
        batch = [_fixed_lists(values, kind) for values, kind in columns]
        self._writer.write_batch(pa.record_batch(batch, schema=self._schema))
        self._written += len(tokens)
        for values, _ in columns:
            self._sha.update(np.ascontiguousarray(values, "<i4").tobytes())
        self._checksums += [_row_checksum(row_CL) for row_CL in np.stack([values for values, _ in columns], 1)]


def _fixed_lists(values: IntArray, kind: Any) -> Any:
    flat = values.reshape(-1).astype(kind.to_pandas_dtype(), copy=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), values.shape[1])


def _features_json(row_length: int, third: str | None) -> dict[str, Any]:
    kinds = {"input_ids": "int32", "segment_ids": "int32"}
    if third is not None:
        kinds[third] = "int8" if third == _MASK else "int32"
    return {
        name: {"feature": {"dtype": kind, "_type": "Value"}, "length": row_length, "_type": "List"}
        for name, kind in kinds.items()
    }


def _features(row_length: int, third: str | None) -> Any:
    """Arrow schema with the metadata by which `datasets` knows its features."""
    features = _features_json(row_length, third)
    info = json.dumps({"info": {"features": features}})
    kinds = {"int32": pa.int32(), "int8": pa.int8()}
    columns = {name: pa.list_(kinds[spec["feature"]["dtype"]], row_length) for name, spec in features.items()}
    return pa.schema(columns, metadata={"huggingface": info})
