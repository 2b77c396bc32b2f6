"""Every call that may fail for want of space, a device or a permission fails once."""

from __future__ import annotations

import errno
import queue
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from logit_cache.base.errors import IncompleteError
from logit_cache.stages.app import main
from logit_cache.store.verify import verify

from tests.conftest import REPOSITORY, files_of
from tests.helpers.fault_client import Server, same_caches
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
TOLD = ("no space left", "input/output error", "permission denied")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes one system call fail."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("no gcc to build the library that makes system calls fail")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(REPOSITORY / "tests/helpers/faults.c"), "-ldl"],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard and one held-out one, with a tail basis of some rank: its 17 files are written like the codebook's."""
    folder = tmp_path_factory.mktemp("small")
    few = {"corpus__max_rows": 2, "corpus__max_heldout_rows": 2, "train__steps": 2, "train__save_steps": 1}
    file = make_recipe(folder, **few, cache__tail_rank=request.param)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def servers(shim: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[queue.Queue[Server]]:
    """One for each core of a small machine."""
    folder = tmp_path_factory.mktemp("servers")
    idle: queue.Queue[Server] = queue.Queue()
    for number in range(2):
        idle.put(Server(folder / str(number), small.parent / "teacher", shim))
    yield idle
    while not idle.empty():
        idle.get().close()


PARTS = {
    "prepare": (),
    "cache": ("cache/corpus", "heldout/corpus"),
    "train": ("cache", "students/student/start"),
}


@pytest.mark.parametrize(
    ("small", "command", "every"),
    [(0, "prepare", 1), (0, "cache", 1), (0, "train", 5), (4, "cache", 10)],
    indirect=["small"],
)
def test_every_write_fsync_and_rename_fails_once(
    servers: queue.Queue[Server], small: Path, tmp_path: Path, command: str, every: int
) -> None:
    """The number-th call fails, by turns with each error: one line, the exit code, nothing half committed; the next run
    completes to the same bytes."""
    reference = small.parent / "run"

    def attempt(number: int) -> tuple[int, str]:
        folder = tmp_path / str(number)
        folder.mkdir()
        for part in PARTS[command]:
            shutil.copytree(reference / part, folder / part)
        server, which = servers.get(), number % 3
        try:
            arguments = (command, str(small), "--set", f"run_dir={folder}")
            fail = [number, ERRORS[which]] if number else [0, 0]
            ended = server.run(*arguments, under=str(folder), fail=fail)
            if number and command == "train":
                # torch.save does not say which error it was, and TensorBoard writes in a thread of its own, which training outlives.
                assert ended.code in (0, 3), f"call {number}: {ended.code}\n{ended.output}"
            elif number:
                assert ended.code == 3, f"call {number}: {ended.code}\n{ended.output}"
                told = [line for line in ended.output.splitlines() if line.startswith("error: ")]
                assert len(told) == 1 and TOLD[which] in told[0], f"call {number}: {ended.output}"
                assert "Traceback" not in ended.output
                for side in ("cache", "heldout"):
                    # Nothing of it at all, or whole.
                    with suppress(IncompleteError):
                        assert verify(folder / side) == {}
            if number:
                again = server.run(*arguments)
                assert again.code == 0, f"after call {number}: {again.output}"
            assert command != "cache" or same_caches(folder, reference)
            if command == "prepare":
                for side in ("cache", "heldout"):
                    assert files_of(folder / side / "corpus") == files_of(reference / side / "corpus")
            if command == "train":
                student = "students/student/final/model.safetensors"
                assert (folder / student).read_bytes() == (reference / student).read_bytes()
            return ended.calls, ended.output
        finally:
            servers.put(server)
            shutil.rmtree(folder)

    calls, _ = attempt(0)
    assert calls > 40
    numbers = range(1, calls + 1, every)
    with ThreadPoolExecutor(2) as threads:
        failed = [error for error in threads.map(lambda n: _failure(attempt, n), numbers) if error]
    print(f"{command}: {len(numbers)} of {calls} calls failed, one at a time")
    assert not failed, f"{len(failed)} of {len(numbers)}:\n" + "\n".join(failed[:8])


def _failure(attempt: Any, number: int) -> str | None:
    try:
        attempt(number)
    except AssertionError as error:
        return str(error)[-1500:]
    return None
