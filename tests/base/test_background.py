"""Work beside the caller's: the same in the same order, and no failure is lost."""

from __future__ import annotations

import threading

import pytest
from logit_cache.base.background import Background


def test_jobs_are_done_in_order_on_another_thread() -> None:
    done: list[tuple[int, bool]] = []
    with Background() as beside:
        for number in range(20):
            beside.add(
                lambda number=number: done.append((number, threading.current_thread() is threading.main_thread()))
            )
    assert done == [(number, False) for number in range(20)]


def test_a_failure_stops_the_caller_and_nothing_after_it_is_done() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"), Background() as beside:
        beside.add(fail)
        for number in range(100):
            beside.add(lambda number=number: done.append(number))
    # One may wait while the first is being done.
    assert len(done) <= 1
    with pytest.raises(OSError, match="no space"), Background() as beside:
        beside.add(fail)


def test_at_most_one_job_waits() -> None:
    go, seen = threading.Event(), threading.Event()

    def fill(beside: Background) -> None:
        for _ in range(3):
            beside.add(go.wait)
        seen.set()

    with Background() as beside:
        filler = threading.Thread(target=fill, args=(beside,))
        filler.start()
        assert not seen.wait(0.2), "a third job was taken while one was being done and one waited"
        go.set()
        filler.join(60)
        assert seen.is_set()


def test_a_stopped_caller_finishes_what_is_being_done_and_drops_what_waits() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def job(number: int) -> None:
        begun.set()
        go.wait(60)
        done.append(number)

    with pytest.raises(KeyboardInterrupt), Background() as beside:
        beside.add(lambda: job(0))
        beside.add(lambda: job(1))
        assert begun.wait(60)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert done == [0]
