"""Reading a cache: rows with their targets, as a torch Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..base.durable import json_digest
from ..base.errors import CorruptError, IncompleteError, RecipeError
from ..base.places import RemotePath, files_in, place
from ..corpus.labels import Columns
from ..corpus.rows import Prepared
from ..corpus.tokenizer import TOKENIZER
from ..recipe.paths import CORPUS
from .arrays import RowIndices, RowLosses, StoredRows
from .batch import Batch, text_batch
from .label_log_probs import TEACHER_LOSS, teacher_losses
from .manifest import Manifest, check_corpus
from .records import Records
from .row_source import RowSource
from .shard_order import RowsByShard
from .shard_readers import ShardReaders

_SCAN_ROWS = 4096


class LogitCache(RowSource):
    """Cached rows with their targets, for reading.

    `len(cache)` rows; `cache[7]` is one of them as a dict; `cache.batch([3, 1, 2])` are several, stacked, decoded
    together. A map-style torch Dataset for DataLoader (with `collate`) and Trainer, safe in forked and spawned workers;
    `stream.RowStream` is the iterable form.

    What an order of shards (`ShardShuffle`, `DistillationTrainer`) reads next of a cache on an object store is copied
    ahead to the folder `local_store` ($LOGIT_CACHE_HOME/shards), which all processes and caches share. It takes at most
    `local_bytes` (64 GiB) and leaves a twentieth of the disk free; 0: nothing is copied.

    Raises IncompleteError where shards are missing, unless `partial`: the cache then has the rows of committed shards
    only. The record and index of a shard are checked at its first read.
    """

    def __init__(
        self,
        path: str | Path | RemotePath,
        *,
        partial: bool = False,
        local_store: str | Path | None = None,
        local_bytes: int | None = None,
    ) -> None:
        self.path = place(path)
        self.manifest = Manifest.read(self.path)
        prepared = Prepared.of_cache(self.path)
        check_corpus(prepared, self.manifest)
        self.records = Records(self.path, self.manifest)
        self.complete = len(self.records) == self.manifest.num_shards
        if not self.complete and not partial:
            raise IncompleteError(
                f"{self.path}: {len(self.records)} of {self.manifest.num_shards} shards are committed: "
                "run `logit-cache cache` to finish it"
            )
        self._shards = ShardReaders(self.path, self.manifest, self.records)
        self._shards.copy_to(local_store, local_bytes)
        self.readers = [self._shards]
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

    @property
    def digest(self) -> str:
        """Digest of the identity; for an incomplete cache, also of the numbers of its shards."""
        return self.manifest.digest if self.complete else json_digest([self.manifest.digest, sorted(self.records)])

    def origins(self, indices: RowIndices) -> RowIndices:
        rows = self.row_numbers(indices)[:, None]
        return np.stack([np.zeros_like(rows), rows])

    def by_shard(self) -> RowsByShard:
        shards = np.fromiter(self.records, np.int64, len(self.records))
        sizes = (
            np.minimum((shards + 1) * self.manifest.shard_rows, self.manifest.rows) - shards * self.manifest.shard_rows
        )
        return RowsByShard(sizes, np.zeros_like(sizes))

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
        return self._shards.read(rows, names)
