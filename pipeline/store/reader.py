"""A cache, read: rows with their targets, as a torch Dataset."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from ..base.durable import json_digest
from ..base.errors import CorruptError, IncompleteError
from ..base.places import RemotePath, files_in, place
from ..corpus.rows import PackedRows
from ..corpus.tokenizer import TOKENIZER
from ..models.packing import document_mask
from .arrays import Rows
from .batch import Batch, IndexArray, split
from .layout import shard_path
from .manifest import Manifest, check_corpus
from .records import Records
from .shards import INDEX_BYTES, ShardReader, read_rows
from .signals import Signal

_ROUND_TRIPS = 16  # at the same time
_INDEX_BYTES = 2**28
"""What is known of where rows lie may take so much memory; of 4 million rows it does."""
_READER_BYTES = 4096  # of a shard, beside what is known of its rows


class LogitCache(Dataset[Batch]):
    """Cached rows with their targets, for reading.

    `len(cache)` rows; `cache[7]` one of them as a dict; `cache.batch([3, 1, 2])` several, stacked, decoded together. A map
    style torch Dataset for DataLoader (with `collate`) and Trainer, safe in forked and spawned workers. `views.RowStream`
    makes an iterable one of it.

    Raises IncompleteError if shards are missing, unless `partial`: then only rows of committed shards are seen. A shard's
    record and files are checked when something of it is first read.
    """

    def __init__(self, path: str | Path | RemotePath, *, partial: bool = False) -> None:
        self.path = place(path)
        self.manifest = Manifest.read(self.path)
        self.records = Records(self.path, self.manifest)
        self.complete = len(self.records) == self.manifest.num_shards
        if not self.complete and not partial:
            raise IncompleteError(
                f"{self.path}: {len(self.records)} of {self.manifest.num_shards} shards are there: "
                "run `logit-cache cache` to finish it"
            )
        self.corpus = PackedRows(self.path / "corpus")
        check_corpus(self.corpus, self.manifest)
        self._rows: IndexArray | None = None
        """Numbers of the rows that are there, where some are not."""
        if not self.complete:
            ranges = [np.arange(*self.manifest.shard_range(shard)) for shard in self.records]
            self._rows = np.concatenate([*ranges, np.empty(0, np.int64)]).astype(np.int64)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        """Of the shards that were read last, the last one at the end."""
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        """Those of them that may have their files open."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        arrays = len(self.manifest.layout())
        self._most_open = max(files // (2 * arrays), 1)
        reader_bytes = _READER_BYTES + INDEX_BYTES * arrays * self.manifest.shard_rows
        self._most_readers = max(_INDEX_BYTES // reader_bytes, self._most_open)

    @property
    def vocab_size(self) -> int:
        return self.manifest.codec.vocab_size

    @property
    def row_length(self) -> int:
        return self.manifest.row_length

    @property
    def objective(self) -> str:
        """causal or masked: what labels and targets predict."""
        return self.manifest.objective

    @property
    def signals(self) -> dict[str, Signal]:
        """What rows have beside the targets, by name."""
        return {signal.name: signal for signal in self.manifest.signals}

    @property
    def knots(self) -> tuple[float, ...]:
        """Inverse temperatures at which the tail's mass is kept."""
        return self.manifest.codec.knots

    @property
    def digest(self) -> str:
        """The identity as one digest; of an incomplete cache, also which shards were there."""
        return self.manifest.digest if self.complete else json_digest([self.manifest.digest, sorted(self.records)])

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the rows."""
        return str(self.manifest.identity["teacher"]["tokenizer"])

    @property
    def tokenizer_dir(self) -> Path:
        """Where that tokenizer can be loaded from."""
        return self.corpus.local / TOKENIZER

    def row_numbers(self, indices: IndexArray) -> IndexArray:
        """Numbers in the corpus of these rows: the same, but where the cache is not complete."""
        rows = np.asarray(indices, np.int64)
        return np.where(rows < 0, rows + len(self), rows) if self._rows is None else self._rows[rows]

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which document of its row every token belongs to [R, L], without reading targets."""
        return self.corpus.take(self.row_numbers(indices))[1]

    @cached_property
    def positions(self) -> int:
        """Positions with a target."""
        return sum(int(record["positions"]) for record in self.records.all())

    @cached_property
    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy on the labels, mean per label in nats."""
        labels = sum(int(record.get("labels", record["positions"])) for record in self.records.all())
        return sum(float(record["teacher_nats"]) for record in self.records.all()) / max(labels, 1)

    @cached_property
    def bytes(self) -> int:
        """Size of everything but corpus/."""
        return sum(size for name, size in files_in(self.path).items() if not name.startswith("corpus/"))

    def __len__(self) -> int:
        return self.manifest.rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """One row: input_ids, labels, segment_ids [L] and targets [L]."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several rows, decoded together; DataLoader prefers this to one at a time."""
        return split(self.batch(indices))

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """Rows in the order asked for, stacked on a leading axis."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) == 0 or wanted.min() < -len(self) or wanted.max() >= len(self):
            raise IndexError(f"rows {list(indices)} are outside 0..{len(self) - 1}")
        rows = self.row_numbers(wanted)
        input_ids, segment_ids, labels = self.corpus.examples(rows)
        stored = self.stored(rows)
        try:
            mask = self.manifest.target_mask(labels, segment_ids)
            targets = self.manifest.codec.decode(stored, input_ids, mask)
            signals = {signal.name: signal.decode(stored, self.row_length) for signal in self.manifest.signals}
        except (ValueError, IndexError) as error:
            raise CorruptError(
                f"{self.path}: rows of shards {np.unique(rows // self.manifest.shard_rows).tolist()} do not decode "
                f"({error}): run `logit-cache verify`"
            ) from error
        batch = Batch(
            input_ids=torch.from_numpy(input_ids).long(),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segment_ids).long(),
            targets=targets,
        )
        if self.objective == "masked":
            batch["attention_mask"] = document_mask(batch["segment_ids"])
        return cast(Batch, {**batch, **signals})

    def stored(self, rows: IndexArray) -> Rows:
        """What the shards hold of rows of the whole cache, in the order asked for, not decoded yet.

        Raises CorruptError for bytes that are not as written.
        """
        parts = [
            self._stored_together(rows[first : first + self._most_open])
            for first in range(0, len(rows), self._most_open)
        ]
        return {name: [row for part in parts for row in part[name]] for name in self.manifest.layout()}

    def _stored_together(self, rows: IndexArray) -> Rows:
        """The same of no more rows than shards may be open."""
        shards, numbers = np.divmod(rows, self.manifest.shard_rows)
        readers = [self._reader(shard) for shard in shards.tolist()]
        unknown = [reader for reader in dict.fromkeys(readers) if not reader.indexed]
        if isinstance(self.path, RemotePath) and len(unknown) > 1:
            with ThreadPoolExecutor(_ROUND_TRIPS) as threads:  # round trips for each, at the same time
                list(threads.map(lambda reader: reader.chunks, unknown))
        return read_rows(list(zip(readers, numbers.tolist(), strict=True)))

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            start, stop = self.manifest.shard_range(shard)
            files = self.records[shard]["files"]
            path, codec = shard_path(self.path, shard), self.manifest.codec
            reader = ShardReader(path, self.manifest.layout(), codec.profile, stop - start, files)
        for held, most in ((self._readers, self._most_readers), (self._open, self._most_open)):
            held[shard] = reader
            held.move_to_end(shard)
            if len(held) > most:
                held.popitem(last=False)[1].close()
        return reader
