"""A shard before its commit: rows as they come from the teacher, staged in a file, and what its record will say."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..base.durable import staging_path
from ..base.kernels import in_threads
from ..base.places import Place
from ..corpus.labels import IGNORE, Columns, labels_of, row_bytes
from ..recipe.paths import CachePaths
from ..targets.sparse_targets import SparseTargets
from .arrays import Arrays, flat_rows
from .manifest import Manifest
from .shard_file import ShardFile, StoredRow

_POSITIONS_OF_A_THREAD = 2**12


class ShardDraft:
    """Takes the rows of one shard in order. As a context manager it deletes what it has staged (`close`)."""

    def __init__(self, cache: Place, manifest: Manifest, shard: int) -> None:
        self.cache, self.shard, self._manifest = cache, shard, manifest
        self.staged = staging_path(CachePaths(cache).shard(shard))
        self.staged.parent.mkdir(parents=True, exist_ok=True)
        self._rows = manifest.shard_range(shard)
        layout, shapes, profile = manifest.layout(), manifest.shapes(), manifest.codec.profile
        rows = self._rows[1] - self._rows[0]
        self._file = ShardFile(self.staged, layout, shapes, profile, rows, manifest.row_length)
        self._sha = hashlib.sha256()
        self._positions = self._labels = 0
        self._nats: list[float] = []
        self.closed = False

    def __enter__(self) -> ShardDraft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self, targets: SparseTargets, columns: Columns, nats: Sequence[float], signals: Arrays | None = None
    ) -> None:
        """Append rows, encoded on as many threads as torch uses: targets [B, L], the columns of the corpus, the
        teacher's own loss summed over each row, and the arrays of all signals.

        Raises ValueError for targets of another codec, and for rows that do not fit the cache.
        """
        rows, labels, encoded = len(nats), labels_of(columns), dict[int, list[StoredRow]]()

        def encode(start: int, stop: int) -> None:
            part = {name: values[start:stop] for name, values in columns.items()}
            others = flat_rows({name: values[start:stop] for name, values in (signals or {}).items()})
            stored = self._manifest.text.encode(part) | others
            stored |= self._manifest.codec.encode(targets[start:stop], part["input_ids"], labels[start:stop])
            encoded[start] = self._file.compressed(stored)

        in_threads(encode, rows, max(_POSITIONS_OF_A_THREAD // self._manifest.row_length, 1))
        for start in sorted(encoded):
            self._file.add(encoded[start])
        self._sha.update(row_bytes(columns))
        self._positions += int(targets.mask.sum())
        self._labels += int((labels != IGNORE).sum())
        self._nats += nats

    def finish(self) -> dict[str, Any]:
        """Complete the staged file; returns its commit record but the digest.

        Raises ValueError where rows are missing.
        """
        return {
            "shard": self.shard,
            "rows": list(self._rows),
            "rows_sha256": self._sha.hexdigest(),
            "identity_digest": self._manifest.digest,
            "positions": self._positions,
            "labels": self._labels,
            # fsum is exact, so the sum does not depend on the size of batches.
            "teacher_nats": math.fsum(self._nats),
            **self._file.finish(),
        }

    def close(self) -> None:
        """Delete the staged file."""
        self._file.close()
        self.staged.unlink(missing_ok=True)
        self.closed = True
