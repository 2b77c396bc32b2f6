"""Reading a cache: rows with their targets, as a torch Dataset."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from weakref import finalize

import numpy as np

from ..base.durable import json_digest
from ..base.errors import CorruptError, IncompleteError, RecipeError
from ..base.places import RemotePath, files_in, place
from ..corpus.labels import Columns
from ..corpus.rows import Prepared
from ..corpus.tokenizer import TOKENIZER
from ..recipe.paths import CORPUS, CachePaths
from .arrays import RowIndices, RowLosses, StoredRows
from .batch import Batch, text_batch
from .label_log_probs import TEACHER_LOSS, teacher_losses
from .manifest import Manifest, check_corpus
from .open_files import OPEN
from .records import Records
from .row_source import RowSource
from .shard_reader import INDEX_BYTES, ShardReader, read_rows

_SCAN_ROWS = 4096
_ROUND_TRIPS = 16  # in parallel
_INDEX_BYTES = 2**28
"""Memory cap for chunk indexes, reached at 4 million rows."""
_READER_BYTES = 4096  # memory of one reader without its chunk index


class LogitCache(RowSource):
    """Cached rows with their targets, for reading.

    `len(cache)` rows; `cache[7]` is one of them as a dict; `cache.batch([3, 1, 2])` are several, stacked, decoded
    together. A map-style torch Dataset for DataLoader (with `collate`) and Trainer, safe in forked and spawned workers;
    `stream.RowStream` is the iterable form.

    Raises IncompleteError where shards are missing, unless `partial`: the cache then has the rows of committed shards
    only. The record and index of a shard are checked at its first read.
    """

    def __init__(self, path: str | Path | RemotePath, *, partial: bool = False) -> None:
        self.path = place(path)
        self.manifest = Manifest.read(self.path)
        self.records = Records(self.path, self.manifest)
        self.complete = len(self.records) == self.manifest.num_shards
        if not self.complete and not partial:
            raise IncompleteError(
                f"{self.path}: {len(self.records)} of {self.manifest.num_shards} shards are committed: "
                "run `logit-cache cache` to finish it"
            )
        prepared = Prepared.of_cache(self.path)
        check_corpus(prepared, self.manifest)
        self.row_length, self.objective = self.manifest.row_length, self.manifest.objective
        self.vocab_size, self.knots = self.manifest.codec.vocab_size, self.manifest.codec.knots
        self.signals = {signal.name: signal for signal in self.manifest.signals}
        self.tokenizer_digest = str(self.manifest.identity["teacher"]["tokenizer"])
        self.tokenizer_dir = prepared.local / TOKENIZER
        self._rows: RowIndices | None = None
        """Corpus numbers of the rows of an incomplete cache."""
        if not self.complete:
            ranges = [np.arange(*self.manifest.shard_range(shard)) for shard in self.records]
            self._rows = np.concatenate([*ranges, np.empty(0, np.int64)]).astype(np.int64)
        self._begin_reading()

    def _begin_reading(self) -> None:
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        """Readers by shard, the last one used at the end."""
        finalize(self, OPEN.close, self._readers.values())
        reader_bytes = _READER_BYTES + INDEX_BYTES * len(self.manifest.layout()) * self.manifest.shard_rows
        self._most_readers = max(_INDEX_BYTES // reader_bytes, OPEN.most)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of the shards: another process reads it again."""
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_reading()

    @property
    def digest(self) -> str:
        """Digest of the identity; for an incomplete cache, also of the numbers of its shards."""
        return self.manifest.digest if self.complete else json_digest([self.manifest.digest, sorted(self.records)])

    def row_numbers(self, indices: Sequence[int] | RowIndices) -> RowIndices:
        """Rows of this dataset -> rows of the corpus; the two differ for an incomplete cache."""
        rows = self.checked(indices)
        return rows if self._rows is None else self._rows[rows]

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[B, L] the document of each token, numbered in its row; reads no targets."""
        text = self.manifest.text
        rows = self.row_numbers(indices)
        with self._decoding(rows):
            return text.segment_ids(self.stored(rows, text.segment_arrays))

    def columns(self, indices: Sequence[int] | RowIndices) -> Columns:
        """The columns [B, L] of the corpus, of rows in the order of `indices`; reads no targets."""
        text, rows = self.manifest.text, self.row_numbers(indices)
        with self._decoding(rows):
            return text.decode(self.stored(rows, list(text.layout())))

    def teacher_losses(self, indices: Sequence[int] | RowIndices | None = None) -> RowLosses:
        if not self.manifest.codec.label_log_probs:
            raise RecipeError(
                f"{self.path}: the cache does not keep the teacher's loss on its rows: cache with "
                "cache.label_log_probs = true"
            )
        rows = self.row_numbers(np.arange(len(self)) if indices is None else indices)
        with self._decoding(rows):
            parts = [rows[first : first + _SCAN_ROWS] for first in range(0, len(rows), _SCAN_ROWS)]
            return np.concatenate([teacher_losses(self.stored(part, [TEACHER_LOSS])) for part in parts])

    @property
    def positions(self) -> int:
        """The number of positions with a target."""
        return self._sums[0]

    @property
    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy, mean per label in nats."""
        return self._sums[2] / max(self._sums[1], 1)

    @cached_property
    def _sums(self) -> tuple[int, int, float]:
        """Positions, labels and the teacher's nats, in one pass over the commit records."""
        positions, labels, nats = 0, 0, 0.0
        for record in self.records.all():
            positions += int(record["positions"])
            labels += int(record["labels"])
            nats += float(record["teacher_nats"])
        return positions, labels, nats

    @cached_property
    def bytes(self) -> int:
        """Size of the cache without its corpus."""
        return sum(size for name, size in files_in(self.path).items() if not name.startswith(f"{CORPUS}/"))

    def __len__(self) -> int:
        return self.manifest.rows if self._rows is None else len(self._rows)

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        """Rows in the order of `indices`, stacked on a leading axis.

        Raises IndexError for a row out of range, CorruptError for rows that are not as written.
        """
        rows = self.row_numbers(indices)
        stored = self.stored(rows)
        with self._decoding(rows):
            text = text_batch(self.manifest.text.decode(stored))
            labels, segment_ids, input_ids = (text[name].numpy() for name in ("labels", "segment_ids", "input_ids"))
            mask = self.manifest.target_mask(labels, segment_ids)
            targets = self.manifest.codec.decode(stored, input_ids, mask, labels)
            signals = {signal.name: signal.decode(stored, self.row_length) for signal in self.manifest.signals}
        return cast(Batch, {**text, "targets": targets, **signals})

    @contextmanager
    def _decoding(self, rows: RowIndices) -> Iterator[None]:
        """Raises CorruptError where the block finds numbers that no encoder writes."""
        try:
            yield
        except (ValueError, IndexError) as error:
            raise CorruptError(
                f"{self.path}: rows of shards {np.unique(rows // self.manifest.shard_rows).tolist()} do not decode "
                f"({error}): run `logit-cache verify`"
            ) from error

    def stored(self, rows: RowIndices, names: Sequence[str] | None = None) -> StoredRows:
        """The stored rows of corpus rows, in that order; of all arrays or of those named.

        Raises CorruptError for missing or damaged bytes.
        """
        parts = [
            self._stored_together(rows[first : first + OPEN.most], names) for first in range(0, len(rows), OPEN.most)
        ]
        return {name: [row for part in parts for row in part[name]] for name in names or self.manifest.layout()}

    def _stored_together(self, rows: RowIndices, names: Sequence[str] | None) -> StoredRows:
        """The same for no more rows than shards may be open."""
        shards, numbers = np.divmod(rows, self.manifest.shard_rows)
        readers = [self._reader(shard) for shard in shards.tolist()]
        with OPEN.using(readers):
            unknown = [reader for reader in dict.fromkeys(readers) if not reader.indexed]
            if isinstance(self.path, RemotePath) and len(unknown) > 1:
                with ThreadPoolExecutor(_ROUND_TRIPS) as threads:  # each index takes round trips
                    list(threads.map(lambda reader: reader.chunks, unknown))
            return read_rows(list(zip(readers, numbers.tolist(), strict=True)), names)

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            start, stop = self.manifest.shard_range(shard)
            file, profile = CachePaths(self.path).shard(shard), self.manifest.codec.profile
            reader = ShardReader(file, self.manifest.layout(), profile, stop - start, self.records[shard])
            reader = self._readers.setdefault(shard, reader)  # another thread may have been first
        self._readers.move_to_end(shard)
        if len(self._readers) > self._most_readers:
            OPEN.close([self._readers.popitem(last=False)[1]])
        return reader
