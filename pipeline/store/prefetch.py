"""Fetching what an order reads next: the shards of a window are copied while the window before is read.

The copies lie in the `local_store` of each cache. A shard of which an order needs most rows is copied whole; of one of
which it needs few, their ranges are. Until a copy is there, and where there is no room for it, rows are read from the
store by ranges, so training never waits for a whole shard.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..base.errors import PipelineError
from .arrays import RowIndices
from .local_store import LocalStore
from .row_source import RowSource
from .shard_readers import ShardReaders

logger = logging.getLogger(__name__)


def prefetched(source: RowSource, windows: Iterator[RowIndices]) -> Iterator[RowIndices]:
    """The rows of each window, while the shards of the next are fetched; local caches have nothing to fetch."""
    if all(readers.local_store is None for readers in source.readers):
        yield from windows
        return
    fetching = _Fetching(source)
    try:
        window = next(windows)
        fetching.add(window)
        for following in windows:
            fetching.add(following)
            yield window
            fetching.forget_oldest()
            window = following
        yield window
    finally:
        fetching.stop()


@dataclass
class _Need:
    """What a window needs of one shard."""

    readers: ShardReaders
    store: LocalStore
    shard: int
    rows: RowIndices
    """Rows of the corpus, in the order of their use."""

    @property
    def copies(self) -> list[Path]:
        return self.store.copies(self.shard)


@dataclass(eq=False)
class _Window:
    rows: RowIndices
    needs: list[_Need] = field(default_factory=list)
    """Of remote caches, in the order of first use, once the thread has found out."""


class _Fetching:
    """A thread that copies the shards of windows, at most two windows at a time: the one that is read and the next."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._windows: deque[_Window] = deque()
        """The windows that are not yet read to the end, the one that is being read first."""
        self._waiting: deque[_Window] = deque()
        """Those of them that are not yet fetched."""
        self._stopped, self._warned = False, False
        threading.Thread(target=self._run, daemon=True, name="prefetch").start()

    def add(self, rows: RowIndices) -> None:
        window = _Window(rows.reshape(-1))
        with self._changed:
            self._windows.append(window)
            self._waiting.append(window)
            self._changed.notify_all()

    def forget_oldest(self) -> None:
        """The oldest window is read."""
        with self._changed:
            self._windows.popleft()
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread, after the request that it waits for."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _needs(self, indices: RowIndices) -> list[_Need]:
        """What rows need of each shard of a remote cache, in the order of first use."""
        numbers, rows = self._source.origins(indices).reshape(2, -1)
        found = []
        for number, readers in enumerate(self._source.readers):
            mine = np.flatnonzero(numbers == number)
            store = readers.local_store
            if store is None or not len(mine):
                continue
            shards = rows[mine] // readers.manifest.shard_rows
            for shard in np.unique(shards).tolist():
                inside = mine[shards == shard]
                found.append((inside[0], _Need(readers, store, shard, rows[inside])))
        return [need for _, need in sorted(found, key=lambda one: one[0])]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting)
                if self._stopped:
                    return
                window = self._waiting.popleft()
            window.needs = self._needs(window.rows)
            for need in window.needs:
                need.store.touch(need.shard)
            for need in window.needs:
                self._fetch(window, need)

    def _fetch(self, window: _Window, need: _Need) -> None:
        """Fetch what is needed of a shard, as soon as there is room, and before its window is read to the end."""
        while True:
            with self._changed:
                if self._stopped or window not in self._windows:
                    return
                being_read = self._windows[0] is window
                needed = {copy for other in self._windows for one in other.needs for copy in one.copies}
            try:
                if need.readers.fetch(need.shard, need.rows, needed, lambda: self._stopped):
                    return
            except (PipelineError, OSError) as error:
                # Whoever reads the shard meets the same error, or none.
                logger.warning(f"prefetch: {error}")
                return
            if being_read:
                self._warn(need)
                return
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or window not in self._windows or self._windows[0] is window
                )

    def _warn(self, need: _Need) -> None:
        if not self._warned and not self._stopped:
            self._warned = True
            logger.warning(
                f"prefetch: {need.copies[0].parent.parent} has no room for the shards of a window, whose other rows are "
                "read one by one: allow more local_bytes or a smaller window"
            )
