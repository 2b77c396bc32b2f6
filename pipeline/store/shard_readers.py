"""The readers of a cache's shards: those used last stay in memory, and what is read next can be copied ahead."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from ..base.durable import home_directory
from ..base.places import Place, RemotePath
from ..recipe.paths import CachePaths
from .arrays import RowIndices, StoredRows
from .local_store import LocalStore
from .manifest import Manifest
from .open_files import OPEN
from .records import Records
from .shard_reader import INDEX_BYTES, ShardReader, read_rows

_ROUND_TRIPS = 16  # in parallel
MOST_INDEX_BYTES = 2**28
"""Memory cap for chunk indexes, reached at 4 million rows."""
_READER_BYTES = 4096  # memory of one reader without its chunk index
_LOCAL_BYTES = 2**36
_WHOLE = 1 / 8
"""Share of a shard's rows from which on it is copied whole."""
_ROWS_AT_ONCE = 256


class ShardReaders:
    """Reads rows of one cache through readers of its shards. Safe in threads and in forked and spawned workers."""

    def __init__(self, cache: Place, manifest: Manifest, records: Records) -> None:
        self.cache, self.manifest, self._records = cache, manifest, records
        self.local_store: LocalStore | None = None
        """Copies of the shards of a cache on an object store."""
        self._begin()

    def _begin(self) -> None:
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        """Readers by shard, the last one used at the end."""
        finalize(self, OPEN.close, self._readers.values())
        reader_bytes = _READER_BYTES + INDEX_BYTES * len(self.manifest.layout()) * self.manifest.shard_rows
        self._most = max(MOST_INDEX_BYTES // reader_bytes, OPEN.most)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of the shards: another process reads it again."""
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def copy_to(self, folder: str | Path | None, limit: int | None) -> None:
        """Change the place and size of the local store; None: the default. A local cache has none."""
        if isinstance(self.cache, RemotePath):
            place, most = Path(folder or home_directory() / "shards"), _LOCAL_BYTES if limit is None else limit
            self.local_store = LocalStore(place, most, self.cache, self.manifest) if most else None

    def read(self, rows: RowIndices, names: Sequence[str] | None) -> StoredRows:
        """The stored rows of corpus rows, in that order; of all arrays or of those named.

        Raises CorruptError for missing or damaged bytes.
        """
        parts = [self._together(rows[first : first + OPEN.most], names) for first in range(0, len(rows), OPEN.most)]
        return {name: [row for part in parts for row in part[name]] for name in names or self.manifest.layout()}

    def _together(self, rows: RowIndices, names: Sequence[str] | None) -> StoredRows:
        """The same for no more rows than shards may be open."""
        shards, numbers = np.divmod(rows, self.manifest.shard_rows)
        by_shard = self._of(np.unique(shards).tolist())
        readers = [by_shard[shard] for shard in shards.tolist()]
        with OPEN.using(readers):
            unknown = [reader for reader in by_shard.values() if not reader.indexed]
            if isinstance(self.cache, RemotePath) and len(unknown) > 1:
                with ThreadPoolExecutor(_ROUND_TRIPS) as threads:  # each index takes round trips
                    list(threads.map(lambda reader: reader.chunks, unknown))
            return read_rows(list(zip(readers, numbers.tolist(), strict=True)), names)

    def _of(self, shards: list[int]) -> dict[int, ShardReader]:
        """Readers by shard; the records of shards that have none yet are read together."""
        readers = {shard: self._readers.get(shard) for shard in shards}
        unknown = [shard for shard, reader in readers.items() if reader is None]
        copied = {shard: self.local_store and self.local_store.record(shard) for shard in unknown}
        records = self._records.several([shard for shard in unknown if not copied[shard]])
        found = {
            # Another thread may have been first.
            shard: self._readers.setdefault(shard, reader or self._new(copied[shard] or records[shard]))
            for shard, reader in readers.items()
        }
        for shard in found:
            with suppress(KeyError):
                self._readers.move_to_end(shard)
        while len(self._readers) > self._most:
            OPEN.close([self._readers.popitem(last=False)[1]])
        return found

    def _new(self, record: dict[str, Any]) -> ShardReader:
        shard, profile = record["shard"], self.manifest.codec.profile
        start, stop = self.manifest.shard_range(shard)
        copies = self.local_store.copies(shard) if self.local_store is not None else ()
        file = CachePaths(self.cache).shard(shard)
        return ShardReader(file, self.manifest.layout(), profile, stop - start, record, copies)

    def fetch(
        self, shard: int, rows: RowIndices, needed: Collection[Path], stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Copy what corpus rows of one shard need to the local store: the whole shard, or few rows alone.

        False where no room can be made beside the copies `needed`. Raises CorruptError for a shard that differs from
        its record, StorageError where the cache cannot be read.
        """
        store, (start, stop) = self.local_store, self.manifest.shard_range(shard)
        if store is None:
            return True
        record = store.record(shard) or self._records[shard]
        if len(rows) >= _WHOLE * (stop - start):
            return store.fetch(record, needed, stopped)
        reader = self._new(record)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[first : first + _ROWS_AT_ONCE] - start
            if not stopped() and not store.add_rows(record, reader.ranges(part), needed):
                return False
        return True
