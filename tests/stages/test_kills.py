"""Killed, stopped or read at any moment: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.errors import IncompleteError
from logit_cache.distill.metrics import read_metrics
from logit_cache.stages.app import main
from logit_cache.store.verify import verify

from tests.conftest import files_of
from tests.helpers.fault_client import Ended, Server, prepared_copy, records, same_caches

pytestmark = pytest.mark.slow


KILLS = 50


def kill_at_random(
    server: Server, draw: random.Random, longest: float, *command: str, when: Callable[[], bool] = lambda: True
) -> Ended:
    """Start a command, await `when`, and kill it after a part of `longest` seconds, unless it ends before."""
    pid = server.start(*command)
    deadline = time.monotonic() + 120
    while not when():
        assert time.monotonic() < deadline, "nothing to kill it for came"
        time.sleep(0.001)
    time.sleep(draw.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)  # also where it has ended: the server has not buried it yet
    return server.wait()


def test_stage_one_killed_at_fifty_moments(recipe: Path, server: Server, tmp_path: Path) -> None:
    draw = random.Random(1)
    seconds = 0.0
    for warm in ("warm-up", "timed"):  # the first one waits for what is read from disk once
        options = prepared_copy(recipe, tmp_path / warm)
        start = time.monotonic()
        assert server.run("cache", str(recipe), *options).code == 0
        seconds = time.monotonic() - start
    print(f"a run takes {seconds:.1f} s", flush=True)
    kills, runs, halfway = 0, 1, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        options = prepared_copy(recipe, folder)
        runs += 1
        before: dict[str, tuple[int, int]] = {}
        while True:
            # A fresh run takes this long; from it, and from what others left, kills fall into every part of the work.
            # Every other run is first killed among its commits, which are a small part.
            if before or runs % 2:
                ended = kill_at_random(server, draw, seconds, "cache", str(recipe), *options)
            else:
                begun = partial(records, folder)
                ended = kill_at_random(server, draw, seconds / 10, "cache", str(recipe), *options, when=begun)
            assert ended.code in (0, -signal.SIGKILL), ended.output
            after = records(folder)
            assert {shard: after[shard] for shard in before} == before, "a committed shard was written again"
            again = set(ended.shards) & set(before)
            assert not again, f"rows of committed shards were computed again: {again}"
            kills += ended.code != 0
            halfway += ended.code != 0 and 0 < len(after) < 6
            before = after
            if ended.code == 0 or kills >= KILLS:
                break
        ended = server.run("cache", str(recipe), *options)
        assert ended.code == 0, ended.output
        assert not set(ended.shards) & set(before)
        assert same_caches(folder, recipe.parent / "run")
        shutil.rmtree(folder)
    print(f"{kills} kills in {runs - 1} runs, {halfway} of them with some shards committed and others not")
    # A good part must fall between the first commit and the last.
    assert halfway > KILLS / 4


def test_stage_two_killed_at_random_moments(recipe: Path, server: Server, tmp_path: Path) -> None:
    """The same losses from the checkpoint on, the same student."""
    draw = random.Random(2)
    undisturbed = recipe.parent / "run/students/student"
    folder = tmp_path / "run"
    for part in ("cache", "students/student/start"):
        shutil.copytree(recipe.parent / "run" / part, folder / part)
    options = ("train", str(recipe), "--set", f"run_dir={folder}")
    student = folder / "students/student"
    metrics = student / "metrics.jsonl"

    def forget() -> None:
        for name in ("final", "checkpoints", "tensorboard"):
            shutil.rmtree(student / name, ignore_errors=True)
        for name in ("run.json", "metrics.jsonl"):
            (student / name).unlink(missing_ok=True)

    seconds = 0.0
    for _ in ("warm-up", "timed"):
        forget()
        start = time.monotonic()
        assert server.run(*options).code == 0
        seconds = time.monotonic() - start
    kills = 0
    while kills < 8:
        forget()
        # The first kill of each student comes after its first checkpoint; the next ones anywhere.
        done = partial(lambda step: len(read_metrics(metrics)) >= step, draw.randint(3, 6))
        ended = kill_at_random(server, draw, 0.01 * seconds, *options, when=done)
        if ended.code == 0:
            continue  # it was faster than the kill
        finished = False
        while ended.code != 0:
            assert ended.code == -signal.SIGKILL, ended.output
            kills += 1
            finished = (student / "final").exists()  # nothing was left to do but to say so
            ended = kill_at_random(server, draw, seconds, *options)
        assert finished or "continuing from" in ended.output, ended.output
        lines, expected = read_metrics(metrics), read_metrics(undisturbed / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 11))
        for line, reference in zip(lines, expected, strict=True):
            assert {name: line[name] for name in ("loss", "kd", "ce", "grad_norm")} == {
                name: reference[name] for name in ("loss", "kd", "ce", "grad_norm")
            }
        one, other = (files_of(where / "final")["model.safetensors"] for where in (student, undisturbed))
        assert one == other


def test_a_task_that_sleeps_while_another_does_its_work(
    recipe: Path, server: Server, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Both are told to write every shard; one is stopped anywhere, wakes when the other is done, and goes on."""
    second = Server(tmp_path_factory.mktemp("second") / "two", recipe.parent / "teacher")
    draw = random.Random(4)
    try:
        for number in range(8):
            folder = tmp_path / str(number)
            command = ("cache", str(recipe), *prepared_copy(recipe, folder))
            sleeper = server.start(*command)
            time.sleep(draw.uniform(0, 0.6))
            os.kill(sleeper, signal.SIGSTOP)
            awake = second.run(*command) if number % 2 else None
            if awake is None:  # both at the same time
                second.start(*command)
                os.kill(sleeper, signal.SIGCONT)
                awake = second.wait()
            else:
                assert LogitCache(folder / "cache").complete
            os.kill(sleeper, signal.SIGCONT)
            woken = server.wait()
            assert (awake.code, woken.code) == (0, 0), awake.output + woken.output
            assert verify(folder / "cache") == {} and same_caches(folder, recipe.parent / "run")
    finally:
        second.close()


def test_a_reader_beside_stage_one_sees_whole_shards_only(
    recipe: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = prepared_copy(recipe, tmp_path / "run")
    whole = LogitCache(recipe.parent / "run/cache")
    sizes = set()
    pid = server.start("cache", str(recipe), *options)
    deadline = time.monotonic() + 120
    while len(sizes) < 3 and time.monotonic() < deadline:
        try:
            seen = LogitCache(tmp_path / "run/cache", partial=True)
        except IncompleteError:
            continue
        if not seen.complete and len(seen):
            rows = seen.row_numbers(np.arange(len(seen)))
            part, same = seen.batch(np.arange(len(seen))), whole.batch(rows)
            assert torch.equal(part["targets"].log_probs, same["targets"].log_probs)
            assert torch.equal(part["labels"], same["labels"])
            sizes.add(len(seen))
    os.kill(pid, signal.SIGKILL)
    server.wait()
    assert len(sizes) >= 2, f"seen with {sizes} rows"
    # Training on an incomplete cache has to be asked for.
    (tmp_path / "run/cache/shards/00004.json").unlink(missing_ok=True)
    start = "run/students/student/start"  # exported already where the run ended before the kill
    shutil.copytree(recipe.parent / start, tmp_path / start, dirs_exist_ok=True)
    assert main(["train", str(recipe), *options]) == 3
    assert "shards are committed: run `logit-cache cache`" in capsys.readouterr().err
    assert main(["train", str(recipe), "--partial", *options, "--set", "train.steps=1"]) == 0
    assert "is not complete" in capsys.readouterr().out
