"""A lock that one process holds at a time, and that ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logit_cache.base.lock import claimed

from tests.conftest import REPOSITORY

HOLD = """
import os, sys, time
from pathlib import Path
from logit_cache.base.lock import claimed
with claimed(Path(sys.argv[1]), ValueError):
    child = os.fork()  # as a process that reads rows is
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_no_lock_and_its_workers_neither(tmp_path: Path) -> None:
    file = tmp_path / "folder/train.lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        with pytest.raises(ValueError, match=rf"^process {holder.pid} on .*, since 20"), claimed(file, ValueError):
            pass
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        deadline = time.monotonic() + 10
        while True:
            try:
                with claimed(file, ValueError):
                    break
            except ValueError:  # the kernel is still at the end of the process
                assert time.monotonic() < deadline
        os.kill(worker, signal.SIGKILL)


def test_a_process_claims_once(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for _ in range(2):
        with claimed(file, ValueError):
            assert f"process {os.getpid()} on" in file.read_text()
            with pytest.raises(ValueError, match="this process"), claimed(tmp_path / "." / "lock", ValueError):
                pass


def test_where_nothing_can_be_locked_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    done = []
    with claimed(tmp_path / "lock", ValueError):
        done.append(1)
    assert done
