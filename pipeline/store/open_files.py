"""The open files of a process, over all its caches: a mixture of many caches keeps within the limit that one does."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol


class Closable(Protocol):
    """What holds an open file, and opens it again when it needs it."""

    def close(self) -> None: ...


class OpenFiles:
    """Closes the files that were used longest ago. Safe in threads and in forked processes."""

    def __init__(self, most: int | None = None) -> None:
        """By default half of the files that the process may open."""
        self.most = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1) if most is None else most
        self._users: OrderedDict[Closable, int] = OrderedDict()
        """File -> how many use it now; the last one used at the end."""
        self._lock = Lock()
        os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = Lock()

    @contextmanager
    def using(self, files: Iterable[Closable]) -> Iterator[None]:
        """While entered, these files stay open once they are. At most `most` of them."""
        own = list(dict.fromkeys(files))
        with self._lock:
            for file in own:
                self._users[file] = self._users.pop(file, 0) + 1
            self._close_others()
        try:
            yield
        finally:
            with self._lock:
                for file in own:
                    self._users[file] -= 1
                self._close_others()

    def close(self, files: Iterable[Closable]) -> None:
        """Close files that nobody uses."""
        with self._lock:
            for file in files:
                self._users.pop(file, None)
                file.close()

    def _close_others(self) -> None:
        surplus = len(self._users) - self.most
        if surplus > 0:
            for file in [file for file, users in self._users.items() if not users][:surplus]:
                del self._users[file]
                file.close()


OPEN = OpenFiles()
"""Those of this process."""
