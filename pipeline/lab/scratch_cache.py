"""Rows and caches for measurements, made as stage one makes them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..capture.learning import learn
from ..capture.shard_pass import fill_shards
from ..corpus.labels import IntArray
from ..corpus.row_writer import RowWriter
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..recipe.paths import CachePaths
from ..store.basis_file import StoredBasis
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from ..store.writer import CacheWriter


def repeat_rows(folder: Path, input_ids: IntArray, segment_ids: IntArray, rows: int) -> PackedRows:
    """A corpus of `rows` rows that repeats those of two arrays [B, L]."""
    writer = RowWriter(folder, input_ids.shape[1])
    for first in range(0, rows, 1024):
        part = np.arange(first, min(first + 1024, rows)) % len(input_ids)
        writer.write_rows(input_ids[part], segment_ids[part], np.ones_like(input_ids[part]))
    writer.commit({})
    return PackedRows(folder)


class CacheMaker:
    """Captures one teacher over one small corpus, as often as a measurement needs."""

    def __init__(
        self, teacher: Teacher, corpus: PackedRows, codec: TargetCodec, batch_rows: int, shard_rows: int
    ) -> None:
        self.teacher, self.corpus, self.codec = teacher, corpus, codec
        self.batch_rows, self.shard_rows = batch_rows, min(shard_rows, corpus.rows)

    def batches(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        for first in range(0, self.corpus.rows, self.batch_rows):
            yield np.arange(first, min(first + self.batch_rows, self.corpus.rows))

    def writer(self, folder: Path, corpus: PackedRows, codec: TargetCodec, shard_rows: int) -> CacheWriter:
        """A writer of a new cache of other rows or another codec, with the teacher's identity."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        CachePaths(folder).corpus.symlink_to(corpus.local.resolve())
        return CacheWriter(folder, Manifest.create(self.teacher.identity, corpus, codec, shard_rows, seed=0))

    @cached_property
    def learned(self) -> tuple[TargetCodec, StoredBasis | None]:
        """The codec fitted to the corpus and its tail basis, once: a part of stage one that does not grow with a large corpus."""
        manifest = Manifest.create(self.teacher.identity, self.corpus, self.codec, self.shard_rows, seed=0)
        return learn(self.teacher, self.corpus, manifest, "bench")

    def capture(self, folder: Path, num_tasks: int = 1) -> None:
        """Stage one, from rows to committed shards, with the learned codec: the share of the first of some tasks."""
        writer = self.writer(folder, self.corpus, self.codec, self.shard_rows)
        logging.disable(logging.INFO)  # log lines and progress bars would be measured
        try:
            writer.begin(*self.learned)
            fill_shards(self.teacher, self.corpus, writer, batch_rows=self.batch_rows, num_tasks=num_tasks)
        finally:
            logging.disable(logging.NOTSET)

    def cache(self, folder: Path) -> LogitCache:
        self.capture(folder)
        return LogitCache(folder)
