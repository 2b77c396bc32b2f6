"""Processes that write the same path: each has names of its own, and what is published is whole."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from logit_cache.base.durable import publish_directory, staging_directory, staging_path
from logit_cache.base.lock import locked
from logit_cache.base.places import RemotePath

FORK = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(number)` in real processes at once; returns their exit codes."""
    started = [FORK.Process(target=work, args=(number,)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


@pytest.mark.parametrize("path", [Path("some/where"), RemotePath("memory://some/where")])
def test_staging_names_differ_in_containers_that_share_host_and_process_number(
    path: Path | RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert len({staging_path(path) for _ in range(100)}) == 100


def write_slowly(path: Path, number: int) -> None:
    with staging_directory(path, alone=True) as staged:
        for part in range(20):
            (staged / f"{part}").write_text(str(number))
            time.sleep(0.005)
        publish_directory(staged, path)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "a file system without locks"])
def test_a_directory_that_several_processes_write_is_whole(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    codes = in_processes(4, lambda number: write_slowly(tmp_path / "made", number))
    assert codes == [0] * 4
    assert len({(tmp_path / "made" / f"{part}").read_text() for part in range(20)}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def without_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work(number: int) -> None:
        for _ in range(30):
            with locked(tmp_path / "path") as held, log.open("a") as file:
                assert held
                file.write(f"{number} ")
                file.flush()
                time.sleep(0.001)
                file.write(f"{number}\n")

    assert in_processes(4, work) == [0] * 4
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == 120 and all(len(line) == 2 and line[0] == line[1] for line in lines)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    ready = FORK.Event()

    def hold(_: int) -> None:
        with staging_directory(tmp_path / "made", alone=True) as staged:
            (staged / "half").write_text("half")
            ready.set()
            time.sleep(60)

    killed = FORK.Process(target=hold, args=(0,))
    killed.start()
    assert ready.wait(30)
    killed.kill()
    killed.join(30)
    assert list(tmp_path.glob("made.tmp*"))
    write_slowly(tmp_path / "made", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["made"], "neither what it staged"
