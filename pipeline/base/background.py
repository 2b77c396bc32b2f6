"""Work on a thread beside the caller's: what was made is written while the caller computes.

Nothing here changes what is done or in which order, and a failure of the thread is raised in the caller, at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Jobs done one after the other on one thread; `add` waits while another one is waiting already.

    Leaving the block waits for all of them. If it is left by an exception, be it a signal's, the job that is being done is
    finished and those that wait are dropped.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._jobs: deque[Future[Any]] = deque()

    def __enter__(self) -> Background:
        return self

    def add(self, job: Callable[[], Any]) -> None:
        """Raises what an earlier job has raised."""
        while self._jobs and (len(self._jobs) > 1 or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._jobs:
                self._jobs.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
