"""Killed, out of disk, damaged: nothing is lost, nothing is done twice, nothing wrong is kept."""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import verify
from pipeline.errors import IncompleteError
from pipeline.training import read_metrics
from stages.__main__ import main
from tests.conftest import REPOSITORY, files_of
from tests.tiny import make_recipe

KILLS = 50


@dataclass(frozen=True)
class Ended:
    code: int
    calls: int
    output: str
    shards: list[str]
    """"side shard" for each that the teacher ran over."""


class Server:
    """Commands in processes of their own, without the seconds that imports take."""

    def __init__(self, folder: Path, teacher: Path, shim: Path | None = None) -> None:
        folder.mkdir()
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(shim)} if shim else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_server", str(teacher)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):
            assert line, "the server of the tests has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, *command: str, **options: Any) -> int:
        """The id of a new process that runs a command; `wait` for it before the next."""
        assert self._process.stdin is not None
        (self._folder / "trace").write_text("")
        request = {"command": command, "output": str(self._folder / "output"), "trace": str(self._folder / "trace")}
        self._process.stdin.write(json.dumps({**request, **options}) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> Ended:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        shards = (self._folder / "trace").read_text().splitlines()
        return Ended(answer["code"], answer["calls"], (self._folder / "output").read_text(), shards)

    def run(self, *command: str, **options: Any) -> Ended:
        self.start(*command, **options)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def records(run: Path) -> dict[str, tuple[int, int]]:
    """Every commit record of a run, and what tells whether it was written again."""
    found = {}
    for side in ("cache", "heldout"):
        for file in (run / side / "shards").glob("*.json"):
            found[f"{side} {int(file.stem)}"] = (file.stat().st_mtime_ns, file.stat().st_ino)
    return found


def prepared_copy(recipe: Path, folder: Path) -> list[str]:
    """The options that send a run to another directory, with its rows there already."""
    for side in ("cache", "heldout"):
        shutil.copytree(recipe.parent / "run" / side / "corpus", folder / side / "corpus")
    return ["--set", f"run_dir={folder}"]


def same_caches(one: Path, other: Path) -> bool:
    return all(files_of(one / side) == files_of(other / side) for side in ("cache", "heldout"))


# --- killed -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty shards and three held-out ones, cached and trained by one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("faults")
    changes = {"cache__shard_rows": 2, "train__steps": 12, "train__batch_rows": 4, "train__save_steps": 3}
    file = make_recipe(folder, **changes)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "one", recipe.parent / "teacher")
    yield running
    running.close()


def kill_at_random(server: Server, draw: random.Random, longest: float, *command: str) -> Ended:
    """Start a command and kill it after a part of `longest` seconds, unless it ends before."""
    pid = server.start(*command)
    time.sleep(draw.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)  # also where it has ended: the server has not buried it yet
    return server.wait()


def test_stage_one_killed_at_fifty_moments(recipe: Path, server: Server, tmp_path: Path) -> None:
    draw = random.Random(1)
    folder = tmp_path / "0"
    options = prepared_copy(recipe, folder)
    start = time.monotonic()
    assert server.run("cache", str(recipe), *options).code == 0
    seconds = time.monotonic() - start
    kills, runs, partial = 0, 1, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        options = prepared_copy(recipe, folder)
        runs += 1
        before: dict[str, tuple[int, int]] = {}
        while True:
            # A fresh run takes this long; from it, and from what others left, kills fall into every part of the work.
            ended = kill_at_random(server, draw, seconds, "cache", str(recipe), *options)
            assert ended.code in (0, -signal.SIGKILL), ended.output
            after = records(folder)
            assert {shard: after[shard] for shard in before} == before, "a committed shard was written again"
            again = set(ended.shards) & set(before)
            assert not again, f"rows of committed shards were computed again: {again}"
            kills += ended.code != 0
            partial += ended.code != 0 and 0 < len(after) < 23
            before = after
            if ended.code == 0 or kills >= KILLS:
                break
        ended = server.run("cache", str(recipe), *options)
        assert ended.code == 0, ended.output
        assert not set(ended.shards) & set(before)
        assert same_caches(folder, recipe.parent / "run")
        shutil.rmtree(folder)
    print(f"{kills} kills in {runs - 1} runs, {partial} of them with some shards committed and others not")
    assert partial > KILLS / 4


def test_stage_two_killed_at_random_moments(recipe: Path, server: Server, tmp_path: Path) -> None:
    """The same losses from the checkpoint on, the same student."""
    draw = random.Random(2)
    undisturbed = recipe.parent / "run/students/student"
    folder = tmp_path / "run"
    for part in ("cache", "students/student/start"):
        shutil.copytree(recipe.parent / "run" / part, folder / part)
    options = ("train", str(recipe), "--set", f"run_dir={folder}")
    start = time.monotonic()
    assert server.run(*options).code == 0
    seconds = time.monotonic() - start
    kills = resumed = 0
    while kills < 12:
        student = folder / "students/student"
        for name in ("final", "checkpoints", "tensorboard"):
            shutil.rmtree(student / name, ignore_errors=True)
        for name in ("run.json", "metrics.jsonl"):
            (student / name).unlink(missing_ok=True)
        while True:
            ended = kill_at_random(server, draw, seconds, *options)
            resumed += "continuing from" in ended.output
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.output
            kills += 1
        lines, expected = read_metrics(student / "metrics.jsonl"), read_metrics(undisturbed / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 13))
        for line, reference in zip(lines, expected, strict=True):
            assert {name: line[name] for name in ("loss", "kd", "ce", "grad_norm")} == {
                name: reference[name] for name in ("loss", "kd", "ce", "grad_norm")
            }
        one, other = (files_of(where / "final")["model.safetensors"] for where in (student, undisturbed))
        assert one == other
    print(f"{kills} kills, {resumed} runs continued from a checkpoint")
    assert resumed >= 3


# --- a disk that fails --------------------------------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
TOLD = ("no space left", "input/output error", "permission denied")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes one system call fail."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("no gcc to build the library that makes system calls fail")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(REPOSITORY / "tests/faults.c"), "-ldl"], check=True
    )
    return library


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard and one held-out one."""
    folder = tmp_path_factory.mktemp("small")
    file = make_recipe(folder, corpus__max_rows=2, corpus__max_heldout_rows=2, train__steps=2, train__save_steps=1)
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


@pytest.mark.parametrize(("command", "every"), [("prepare", 1), ("cache", 1), ("train", 5)])
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
            if number:
                assert ended.code == 3, f"call {number}: {ended.code}\n{ended.output}"
                told = [line for line in ended.output.splitlines() if line.startswith("error: ")]
                assert len(told) == 1 and TOLD[which] in told[0], f"call {number}: {ended.output}"
                assert "Traceback" not in ended.output
                for side in ("cache", "heldout"):
                    try:
                        assert verify(folder / side) == {}
                    except IncompleteError:
                        assert command != "train"
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
