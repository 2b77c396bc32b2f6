"""A thread for writing while the caller computes.

Jobs run in order; the caller's next call raises the failure of a job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Runs jobs in order on one thread; at most one job waits, `add` blocks until there is room.

    Leaving the block waits for all jobs. After an exception, also one of a signal, the running job finishes and the
    waiting one is dropped.
    """

    def __init__(self, begin: Callable[[], None] | None = None) -> None:
        """`begin` is the first thing that the thread does."""
        self._pool = ThreadPoolExecutor(1, initializer=begin)
        self._jobs: deque[Future[Any]] = deque()

    def __enter__(self) -> Background:
        return self

    def add(self, job: Callable[[], Any]) -> None:
        """Queue a job. Raises the exception of an earlier job."""
        while self._jobs and (len(self._jobs) > 1 or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._jobs:
                self._jobs.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
