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
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import LogitCache, SparseTargets, collate
from logit_cache.base.durable import json_digest
from logit_cache.base.errors import CorruptError, IncompleteError, MismatchError
from logit_cache.base.places import RemotePath
from logit_cache.distill.metrics import read_metrics
from logit_cache.stages.app import main
from logit_cache.store import writer as writer_module
from logit_cache.store.manifest import Manifest
from logit_cache.store.verify import verify
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.supports import Support
from torch.utils.data import DataLoader

from tests.conftest import REPOSITORY, files_of
from tests.helpers.synthetic import KNOTS, VOCAB, make_cache, random_rows, teacher_logits
from tests.helpers.tiny import make_recipe

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
            [sys.executable, "-m", "tests.helpers.fault_server", str(teacher)],
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
    """Five shards and a held-out one, cached and trained by one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("faults")
    changes = {"cache__shard_rows": 8, "train__steps": 10, "train__batch_rows": 4, "train__save_steps": 2}
    file = make_recipe(folder, **changes)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "one", recipe.parent / "teacher")
    yield running
    running.close()


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
            ended = kill_at_random(server, draw, seconds, "cache", str(recipe), *options)
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
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(REPOSITORY / "tests/helpers/faults.c"), "-ldl"],
        check=True,
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


# --- damaged ------------------------------------------------------------------------------------------------------------

DAMAGES = 1000


@dataclass
class Rows:
    """All that a student can see of a cache."""

    def __init__(self, cache: LogitCache) -> None:
        batch = cache.batch(np.arange(len(cache)))
        targets = batch["targets"]
        self.tensors = [batch["input_ids"], batch["labels"], batch["segment_ids"]]
        self.tensors += [targets.token_ids, targets.log_probs, targets.tail_curve, targets.mask]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Rows)
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))


def damage(folder: Path, draw: random.Random) -> tuple[str, list[Path]]:
    """Do one harm to one file; returns what, and the files that it touched."""
    file = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    data = file.read_bytes()
    kind = draw.choice(("flipped", "truncated", "emptied", "deleted", "swapped"))
    if kind == "swapped":
        inside = file.relative_to(folder).as_posix()
        alike = [p for p in sorted(folder.rglob(file.name)) if p != file and p.is_file() and p.read_bytes() != data]
        twins = [p for p in alike if p.relative_to(folder).as_posix()[12:] == inside[12:]] or alike
        others = twins or sorted(p for p in folder.rglob("*") if p.is_file() and p != file and p.read_bytes() != data)
        other = draw.choice(others)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return kind, [file, other]
    if kind == "deleted":
        file.unlink()
    elif kind == "flipped" and data:
        bad = bytearray(data)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
    else:
        file.write_bytes(data[: draw.randrange(len(data))] if kind == "truncated" and data else b"")
    return kind, [file]


def means_the_same(now: Path, before: bytes) -> bool:
    """Whether a damaged JSON file still says what it said, as without its last line end."""
    try:
        return now.suffix == ".json" and json.loads(now.read_bytes()) == json.loads(before)
    except (OSError, ValueError):
        return False


def test_a_thousand_damages(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    good = Rows(make_cache(folder, rows=6, length=8, shard_rows=2))
    originals = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    draw = random.Random(3)
    refused = harmless = named = 0
    for _ in range(DAMAGES):
        kind, touched = damage(folder, draw)
        names = [file.relative_to(folder).as_posix() for file in touched]
        changed = [f for f in touched if not f.exists() or f.read_bytes() != originals[f]]
        what = f"{kind}: {names}"
        try:
            assert Rows(LogitCache(folder)) == good, f"{what}: wrong numbers reach a student"
            harmless += 1
        except (CorruptError, MismatchError, IncompleteError):
            refused += 1
        try:
            bad = verify(folder)
        except (CorruptError, MismatchError, IncompleteError):
            assert not all(name.startswith("shards/") for name in names), what
        else:
            deleted = [name for name in names if not (folder / name).exists()]
            uncommitted = {int(name[7:12]) for name in deleted if len(name) == len("shards/00000.json")}
            expected = {int(name[7:12]) for name in names if name.startswith("shards/")} - uncommitted
            quiet = all(means_the_same(file, originals[file]) for file in changed)
            assert set(bad) == expected or quiet, f"{what}: verify says {bad}"
            named += bool(bad)
        for file in touched:
            file.write_bytes(originals[file])
    assert Rows(LogitCache(folder)) == good and verify(folder) == {}
    print(
        f"{DAMAGES} damages: {refused} refused by the reader, {harmless} that change no number; {named} named by shard"
    )
    assert refused > DAMAGES / 2


def test_repair_makes_only_the_bad_shards_again(recipe: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    cache = tmp_path / "run/cache"
    (cache / "shards/00001.zarr/codes/c/0/0").write_bytes(b"")
    (cache / "shards/00003.json").write_text("{}")
    assert main(["verify", str(cache)]) == 4
    assert main(["verify", str(cache), "--repair"]) == 0
    ended = server.run("cache", str(recipe), "--set", f"run_dir={tmp_path / 'run'}")
    assert (ended.code, ended.shards) == (0, ["cache 1", "cache 3"]), ended.output
    assert same_caches(tmp_path / "run", recipe.parent / "run")


def test_a_damaged_corpus_is_prepared_again(recipe: Path, server: Server, tmp_path: Path) -> None:
    """No shard is dropped for it, and the teacher never sees it."""
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    corpus = tmp_path / "run/cache/corpus"
    row = LogitCache(corpus.parent).corpus.take(np.array([20]))[0]  # of shard 2
    data = (corpus / "data-00000-of-00001.arrow").read_bytes()
    assert data.count(row.tobytes()) == 1
    (corpus / "data-00000-of-00001.arrow").write_bytes(data.replace(row.tobytes(), (row ^ 1).tobytes()))
    options = ("--set", f"run_dir={tmp_path / 'run'}")
    assert main(["verify", str(corpus.parent), "--repair"]) == 4
    (corpus.parent / "shards/00002.json").unlink()
    assert server.run("cache", str(recipe), *options).code == 4
    assert len(list((corpus.parent / "shards").glob("*.json"))) == 4
    shutil.rmtree(corpus)
    assert server.run("prepare", str(recipe), *options).code == 0
    assert server.run("cache", str(recipe), *options).code == 0
    assert same_caches(tmp_path / "run", recipe.parent / "run")


# --- several at once ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("store", ["disk", "bucket"])
@pytest.mark.parametrize("moment", ["write_group", "publish_directory", "create_json"])
@pytest.mark.parametrize("after", [False, True])
def test_two_tasks_with_other_bytes_for_one_shard(
    tmp_path: Path, store: str, moment: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two kinds of GPU: whoever is last sees to it that record and files belong together."""
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    place = tmp_path / "cache" if store == "disk" else RemotePath(f"memory://tasks/{uuid.uuid4().hex}")
    make_cache(tmp_path / "made", rows=2, length=8, shard_rows=2)
    for file in sorted(p for p in (tmp_path / "made").rglob("*") if p.is_file()):
        name = file.relative_to(tmp_path / "made").as_posix()
        if not name.startswith("shards/"):
            target = place / name
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    input_ids, segment_ids = random_rows(2, 8)
    manifest = Manifest.read(place)
    mask = LogitCache(tmp_path / "made").batch([0, 1])["targets"].mask

    def write(teacher: int) -> None:
        logits = teacher_logits(
            torch.from_numpy(input_ids).long(), torch.from_numpy(segment_ids).long(), VOCAB, teacher
        )
        targets = SparseTargets.from_logits(logits.float(), k=8, knots=KNOTS, mask=mask)
        digest = json.loads((tmp_path / "made/shards/00000.json").read_text())["rows_sha256"]
        writer = CacheWriter(place, manifest)
        writer.pending()  # lists what the other task has begun, to remove it once the shard is committed
        writer.write(0, targets, input_ids, digest, float(teacher))

    real, interrupted = getattr(writer_module, moment), []

    def interfere(*args: Any, **kwargs: Any) -> Any:
        first = not interrupted
        interrupted.append(1)
        if first and not after:
            other()
        result = real(*args, **kwargs)
        if first and after:
            other()
        return result

    def other() -> None:
        with monkeypatch.context() as patch:
            number = os.getpid() + 1
            patch.setattr("logit_cache.base.durable.os.getpid", lambda: number)
            write(1)

    monkeypatch.setattr(writer_module, moment, interfere)
    write(2)
    assert interrupted
    assert verify(place) == {}
    found = LogitCache(place)
    assert found.records[0]["teacher_nats"] in (1.0, 2.0)
    reference = Rows(found)
    monkeypatch.undo()
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    assert Rows(LogitCache(place)) == reference
    if isinstance(place, Path):
        assert {p.name for p in (place / "shards").iterdir()} == {"00000.json", "00000.zarr"}


@pytest.mark.parametrize("moment", ["write_group", "publish_directory"])
def test_a_task_whose_codebook_was_discarded_uses_the_other_tasks(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third task, which starts when the cache is begun, discards what the first has staged."""
    made = make_cache(tmp_path / "made", rows=8, length=64, shard_rows=4, support=Support("sampled", draws=40))
    codec, prepared = made.manifest.codec, made.manifest
    assert codec.codebook is not None
    place = tmp_path / "cache"
    shutil.copytree(tmp_path / "made/corpus", place / "corpus")
    real, interrupted = getattr(writer_module, moment), []

    def interfere(*args: Any, **kwargs: Any) -> Any:
        if not interrupted:
            interrupted.append(1)
            with monkeypatch.context() as patch:
                number = os.getpid() + 1
                patch.setattr("logit_cache.base.durable.os.getpid", lambda: number)
                CacheWriter(place, prepared).begin(codec)
                CacheWriter(place, prepared).pending()
        return real(*args, **kwargs)

    first = CacheWriter(place, prepared)
    monkeypatch.setattr(writer_module, moment, interfere)
    first.begin(codec)
    assert interrupted and first.begun
    assert files_of(place) == {
        name: data for name, data in files_of(tmp_path / "made").items() if not name.startswith("shards/")
    }


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
    shutil.copytree(recipe.parent / "run/students/student/start", tmp_path / "run/students/student/start")
    assert main(["train", str(recipe), *options]) == 3
    assert "shards are committed: run `logit-cache cache`" in capsys.readouterr().err
    assert main(["train", str(recipe), "--partial", *options, "--set", "train.steps=1"]) == 0
    assert "is not complete" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(tmp_path: Path, method: str) -> None:
    cache = make_cache(tmp_path / "cache")
    whole = cache.batch(np.arange(len(cache)))  # every file is open before the workers are there
    loader = DataLoader(cache, batch_size=5, num_workers=2, collate_fn=collate, multiprocessing_context=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forking a process that has threads, as torch's are
        batches = list(loader)
    assert torch.equal(torch.cat([batch["targets"].log_probs for batch in batches]), whole["targets"].log_probs)
    assert torch.equal(cache.batch([3])["targets"].log_probs, whole["targets"].log_probs[3:4])


# --- hostile ------------------------------------------------------------------------------------------------------------


def changed(path: str, value: object) -> Callable[[Any], Any]:
    """Set one value of a JSON document, by its keys."""

    def change(document: Any) -> Any:
        node = document
        *parents, last = path.split("/")
        for key in parents:
            node = node[key]
        node[last] = value
        return document

    return change


def deep(document: Any) -> bytes:
    return b'{"a":' * 100_000 + b"1" + b"}" * 100_000


HOSTILE_MANIFESTS: dict[str, Callable[[Any], Any]] = {
    "rows of 2^60": changed("layout/rows", 2**60),
    "shards of 2^60 rows": changed("layout/shard_rows", 2**60),
    "rows below 0": changed("layout/rows", -1),
    "rows as a flag": changed("layout/rows", True),
    "a row of 2^60 tokens": changed("layout/row_length", 2**60),
    "a vocabulary of 2^60": changed("codec/vocab_size", 2**60),
    "k of 2^60": changed("codec/support/k", 2**60),
    "another codec": changed("codec/name", "pickle"),
    "another profile": changed("codec/profile", "pickle"),
    "other chunk codecs": changed("chunk_codecs", [{"name": "numcodecs.pickle"}]),
    "codebook elsewhere": changed("codec/codebook", "../../../../etc"),
    "knots that are text": changed("codec/knots", ["../x"]),
    "shards that are no list": changed("shards", 7),
    "identity that is no table": changed("identity", []),
    "a list": lambda document: [document],
    "deep": deep,
    "a number of 5,000 digits": lambda document: b'{"format_version": ' + b"9" * 5000 + b"}",
    "not UTF-8": lambda document: b'{"\xff": 1}',
}
HOSTILE_RECORDS: dict[str, Callable[[Any], Any]] = {
    "a file elsewhere": lambda document: {
        **document,
        "files": {"codes/c/../../../../../etc/passwd": {"size": 1}, **document["files"]},
    },
    "an absolute path": lambda document: {**document, "files": {"/etc/passwd": {"size": 1}, **document["files"]}},
    "a size of 2^60": lambda document: {
        **document,
        "files": {name: {**facts, "size": 2**60} for name, facts in document["files"].items()},
    },
    "a size that is text": lambda document: {
        **document,
        "files": {name: {**facts, "size": "1"} for name, facts in document["files"].items()},
    },
    "checksums that are none": lambda document: {
        **document,
        "files": {name: {**facts, "crc32c": "?"} for name, facts in document["files"].items()},
    },
    "no files": changed("files", {}),
    "files as a list": changed("files", []),
    "positions as text": changed("positions", "7"),
    "NaN": changed("teacher_nats", float("nan")),
    "of another shard": changed("shard", 1),
    "deep": deep,
    "a list": lambda document: [],
}


def replace_json(file: Path, change: Callable[[Any], Any]) -> None:
    """As somebody does it who knows the format: digests are made to fit."""
    value = change(json.loads(file.read_text()))
    if isinstance(value, dict) and "record_sha256" in value:
        value["record_sha256"] = json_digest({k: v for k, v in value.items() if k != "record_sha256"})
    if isinstance(value, dict) and "identity_digest" in value and isinstance(value.get("identity"), dict):
        value["identity"] = {**value["identity"], "codec": value.get("codec")}
        value["identity_digest"] = json_digest(value["identity"])
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize("which", ["manifest", "record"])
def test_hostile_files_are_refused(tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit 4, and nothing is read elsewhere or made as large as they say."""
    cache = tmp_path / "cache"
    make_cache(cache, rows=6, length=8, shard_rows=2)
    file = cache / ("manifest.json" if which == "manifest" else "shards/00000.json")
    original = file.read_bytes()
    for name, change in (HOSTILE_MANIFESTS if which == "manifest" else HOSTILE_RECORDS).items():
        replace_json(file, change)
        capsys.readouterr()
        code = main(["verify", str(cache)])
        shown = capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert code == 4 and len(errors) == 1 and len(errors[0]) < 1500, f"{name}: {code} {shown.err[:500]}"
        with pytest.raises((CorruptError, MismatchError)):
            reader = LogitCache(cache)
            reader.batch(np.arange(len(reader)))
        file.write_bytes(original)
    assert main(["verify", str(cache)]) == 0


def test_no_pickle_is_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a cache; and of the checkpoints that are the run's own, with torch's restricted reader only."""
    import pickle

    def refuse(*args: object, **kwargs: object) -> object:
        raise AssertionError("a pickle is read")

    loaded: list[bool] = []
    load = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs.get("weights_only") is True)
        return load(*args, **kwargs)

    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/students/student/final")
    shutil.rmtree(tmp_path / "run/students/student/checkpoints/checkpoint-10")
    for file in (tmp_path / "run").rglob("*"):
        if file.suffix in (".bin", ".pkl", ".pickle", ".npy"):
            assert file.name == "training_args.bin", f"{file} is a pickle"
            file.write_bytes(b"not read")
    monkeypatch.setattr(torch, "load", watched)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    Rows(LogitCache(tmp_path / "run/cache"))
    assert main(["train", str(recipe), "--set", f"run_dir={tmp_path / 'run'}"]) == 0
    assert loaded and all(loaded)


def test_weights_that_are_pickles_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher and student."""
    other = tmp_path / "other"
    shutil.copytree(recipe.parent / "teacher", other)
    weights = other / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), other / "pytorch_model.bin")
    weights.unlink()
    options = ["--set", f"run_dir={tmp_path / 'run'}"]
    prepared_copy(recipe, tmp_path / "run")
    assert main(["cache", str(recipe), *options, "--set", f"teacher.model={other}"]) == 2
    assert "safetensors" in capsys.readouterr().err
    shutil.copytree(recipe.parent / "run/cache", tmp_path / "run/cache", dirs_exist_ok=True)
    assert main(["train", str(recipe), *options, "--set", f"students.student.model={other}"]) == 2
    assert "safetensors" in capsys.readouterr().err
