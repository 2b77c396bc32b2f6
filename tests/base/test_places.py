"""Caches on object stores: written without rename, read by ranges, and the same as on a disk."""

from __future__ import annotations

import json
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from logit_cache import LogitCache, collate
from logit_cache.base import places as storage
from logit_cache.base.durable import create_json, publish_directory, read_json, remove_tree, write_json
from logit_cache.base.errors import CorruptError, IncompleteError, RecipeError, StorageError
from logit_cache.base.places import RemotePath, files_in, modified_in, names_in, place, read_all, read_ranges
from logit_cache.corpus.rows import PackedRows
from logit_cache.stages.app import main
from logit_cache.store.verify import verify
from torch.utils.data import DataLoader

from tests.conftest import files_of
from tests.helpers.s3 import S3
from tests.helpers.synthetic import make_cache
from tests.helpers.tiny import make_recipe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies of remote corpora are kept."""
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with S3() as running:
        yield running


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> RemotePath:
    """An empty prefix of its own."""
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3").bucket
    found = place(f"{root}/{uuid.uuid4().hex}/")
    assert isinstance(found, RemotePath)
    return found


def contents(folder: RemotePath) -> dict[str, bytes]:
    names = list(files_in(folder))
    return {name: data for name, data in zip(names, read_all([folder / name for name in names]), strict=True) if data}


# --- places
# -------------------------------------------------------------------------------------------------------------


def test_paths_and_file_urls_are_local_others_are_not() -> None:
    assert place("runs/demo") == place(Path("runs/demo")) == Path("runs/demo")
    assert place("file:///data/run") == Path("/data/run")
    remote = place("s3://bucket/run/")
    assert str(remote / "cache") == "s3://bucket/run/cache"
    assert (remote / "cache").name == "cache" and (remote / "cache").parent == remote
    with pytest.raises(RecipeError, match="no package is installed that opens nothing://"):
        place("nothing://bucket/run")


def test_objects_like_files(bucket: RemotePath, tmp_path: Path) -> None:
    file = bucket / "folder" / "file"
    assert not file.exists() and read_json(file, "") is None
    assert names_in(bucket) == set() and files_in(bucket) == modified_in(bucket) == {}
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    write_json(file, {"a": 1})
    assert read_json(file, "") == {"a": 1}
    assert not create_json(file, {"a": 2}) and read_json(file, "") == {"a": 1}
    assert create_json(bucket / "other", {"a": 3})
    assert names_in(bucket) == {"folder", "other"} and set(files_in(bucket)) == {"folder/file", "other"}
    assert read_all([bucket / "other", bucket / "none", file]) == [b'{\n "a": 3\n}\n', None, b'{\n "a": 1\n}\n']
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()
    (tmp_path / "up/deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (tmp_path / "up" / name).write_text(name)
    write_json(bucket / "tree/left over", 1)
    publish_directory(tmp_path / "up", bucket / "tree", last="one")
    assert contents(bucket / "tree") == {"one": b"one", "deep/two": b"deep/two"}
    assert not (tmp_path / "up").exists()
    (bucket / "tree").download(tmp_path / "down")
    assert files_of(tmp_path / "down") == contents(bucket / "tree")
    remove_tree(bucket / "tree")
    assert files_in(bucket / "tree") == {}


def test_a_directory_is_listed_while_another_writes_it(tmp_path: Path) -> None:
    """A writer publishes by renaming: what was listed may be gone when it is looked at."""
    assert files_in(tmp_path / "none") == modified_in(tmp_path / "none") == {}
    (tmp_path / "whole").write_bytes(b"123")
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            (tmp_path / "aside").mkdir()
            (tmp_path / "aside/file").write_bytes(b"1")
            (tmp_path / "aside").rename(tmp_path / "there")
            (tmp_path / "there/file").unlink()
            (tmp_path / "there").rmdir()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            found, times = files_in(tmp_path), modified_in(tmp_path)
            assert found.pop("whole") == 3 and "whole" in times
            assert found.keys() <= {"aside/file", "there/file"}
    finally:
        over.set()
        writer.join()


def test_near_ranges_are_one_request(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    for name in ("one", "two"):
        (bucket / name).write_bytes(data)
    asked: list[int] = []
    system, _ = storage._system(bucket.url)
    ranges = system.cat_ranges

    def counted(paths: list[str], *args: object, **kwargs: object) -> object:
        asked.append(len(paths))
        return ranges(paths, *args, **kwargs)

    monkeypatch.setattr(system, "cat_ranges", counted)
    wanted = [
        ("one", 250_000, 50),
        ("two", 7, 5),
        ("one", 100, 10),
        ("one", 0, 100),
        ("one", 105, 3),
        ("one", 30_000, 9),
    ]
    names, starts, lengths = zip(*wanted, strict=True)
    found = read_ranges([bucket / name for name in names], starts, lengths)
    assert found == [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    assert asked == [3]
    with pytest.raises(FileNotFoundError):
        read_ranges([bucket / "none"], [0], [1])


class Flaky:
    """Fails so many times before every answer."""

    def __init__(self, system: object, failures: int, error: Exception) -> None:
        self._system, self._left, self._error = system, failures, error
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self._left > 0:
                self._left -= 1
                raise self._error
            return getattr(self._system, name)(*args, **kwargs)

        return call


def test_what_fails_is_tried_again_after_longer_and_longer_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    system, path = storage._system("memory://flaky/file")
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    file = RemotePath("memory://flaky/file")

    def with_failures(count: int, error: Exception) -> Flaky:
        flaky = Flaky(system, count, error)
        monkeypatch.setattr(storage, "_system", lambda url: (flaky, path))
        return flaky

    assert with_failures(3, OSError("503 slow down")).calls == 0
    file.write_bytes(b"data")
    assert len(slept) == 3 and slept == sorted(slept) and slept[0] >= storage.PAUSES[0]
    with_failures(2, TimeoutError())
    assert file.read_bytes() == b"data"
    flaky = with_failures(99, OSError("503 slow down"))
    with pytest.raises(StorageError, match=r"memory://flaky/file: cannot read it, 8 attempts failed \(503 slow down\)"):
        file.read_bytes()
    assert flaky.calls == 8
    flaky = with_failures(99, PermissionError("denied"))
    with pytest.raises(StorageError, match="permission denied"):
        file.read_bytes()
    assert flaky.calls == 1, "asking again does not give permission"


# --- caches
# -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "cache"
    make_cache(folder)
    return folder


def upload(folder: Path, bucket: RemotePath) -> None:
    """As `aws s3 sync` does it."""
    for name, data in files_of(folder).items():
        (bucket / name).write_bytes(data)


def same_rows(one: LogitCache, other: LogitCache) -> None:
    assert len(one) == len(other)
    rows = np.random.default_rng(0).permutation(len(other))
    for part in (rows, rows[:1], rows[:3]):
        a, b = one.batch(part), other.batch(part)
        for name in ("input_ids", "labels", "segment_ids"):
            assert torch.equal(a[name], b[name])
        for name in ("token_ids", "log_probs", "tail_curve", "mask"):
            assert torch.equal(getattr(a["targets"], name), getattr(b["targets"], name))


@pytest.mark.slow
def test_a_cache_that_was_copied_to_a_bucket_opens_there(disk: Path, bucket: RemotePath, home: Path) -> None:
    upload(disk, bucket)
    remote, local = LogitCache(str(bucket)), LogitCache(disk)
    same_rows(remote, local)
    assert (remote.bytes, remote.positions, remote.digest) == (local.bytes, local.positions, local.digest)
    assert verify(bucket) == {}
    assert len(list(home.iterdir())) == 2, "the tokenizer for reading and the corpus for verify, once each"
    assert main(["inspect", str(bucket), "--json"]) == 0
    assert main(["verify", str(bucket)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_from_a_bucket(disk: Path, s3: S3, method: str) -> None:
    bucket = RemotePath(f"{s3.bucket}/{uuid.uuid4().hex}")
    upload(disk, bucket)
    cache = LogitCache(bucket)
    expected = cache.batch([0])  # connections and threads are there before the workers are
    loader = DataLoader(cache, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forking a process that has threads, as torch's are
        batches = list(loader)
    assert torch.equal(batches[0]["targets"].log_probs[:1], expected["targets"].log_probs)
    whole = LogitCache(disk).batch(np.arange(len(cache)))
    assert torch.equal(torch.cat([batch["targets"].token_ids for batch in batches]), whole["targets"].token_ids)


DAMAGE = {
    "manifest.json": "not valid JSON",
    "shards/00001.json": "not valid JSON",
    "shards/00001.zarr.zip": "checksum|index|missing",
    "corpus/tokenizer/tokenizer.json": "differs from what `prepare` wrote",
    "corpus/prepared.json": "not valid JSON",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_a_bucket_is_noticed(disk: Path, name: str) -> None:
    bucket = RemotePath(f"memory://damaged/{uuid.uuid4().hex}")
    upload(disk, bucket)
    data = (bucket / name).read_bytes()
    # The end of a shard is the zip file's directory, which only zarr-python reads, and the digest of the file covers.
    end = LogitCache(disk).records[1]["index"]["offset"] + 9 if name.endswith(".zip") else len(data) - 5
    for bad in (data[:end], data[: end // 2], b""):
        (bucket / name).write_bytes(bad)
        with pytest.raises(CorruptError, match=DAMAGE[name] if len(bad) < end else name):
            cache = LogitCache(bucket)
            cache.batch(np.arange(len(cache)))
    (bucket / name).unlink()
    with pytest.raises((CorruptError, IncompleteError)):
        cache = LogitCache(bucket)
        cache.batch(np.arange(len(cache)))


@pytest.mark.parametrize("file", ["prepared.json", "portions.json", "tokenizer/tokenizer.json", "rows"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_local_copy_is_made_anew(disk: Path, home: Path, file: str, how: str) -> None:
    bucket = RemotePath(f"memory://copied/{uuid.uuid4().hex}")
    upload(disk, bucket)
    first = PackedRows.of_cache(bucket)
    expected = first.columns(np.arange(first.rows))
    whole = files_of(first.local)
    damaged = next(first.local.glob("*.arrow")) if file == "rows" else first.local / file
    data = bytearray(damaged.read_bytes())
    damaged.unlink()
    if how != "gone":
        # JSON stays JSON.
        data[-4:] = data[-4:].replace(b"}", b" }") if how == "changed" and file.endswith("json") else data[-4:-1]
        damaged.write_bytes(data)
    again = PackedRows.of_cache(bucket)
    assert np.array_equal(again.columns(np.arange(again.rows))["input_ids"], expected["input_ids"])
    assert files_of(again.local) == whole
    assert len(list(home.iterdir())) == 1, "nothing else is left there"


def test_no_place_for_a_copy_is_no_damage(disk: Path, home: Path) -> None:
    bucket = RemotePath(f"memory://copied/{uuid.uuid4().hex}")
    upload(disk, bucket)
    home.write_text("a file")
    with pytest.raises(StorageError, match="set LOGIT_CACHE_HOME to"):
        LogitCache(bucket)


def test_a_damaged_row_of_a_local_copy_is_mended_by_the_next_run(disk: Path) -> None:
    """Rows are checked as they are read, and it is the copy that the error speaks of."""
    bucket = RemotePath(f"memory://copied/{uuid.uuid4().hex}")
    upload(disk, bucket)
    copy = PackedRows.of_cache(bucket).local
    (arrow,) = copy.glob("*.arrow")
    data = arrow.read_bytes()
    row = PackedRows.of_cache(disk).take(np.array([3]))[0].astype("<u2").tobytes()
    assert data.count(row) == 1
    arrow.write_bytes(data.replace(row, bytes([row[0] ^ 1]) + row[1:]))
    corpus = PackedRows.of_cache(bucket)
    with pytest.raises(CorruptError, match=f"row 3 .* in the local copy {copy}, now deleted: run the same"):
        corpus.take(np.arange(corpus.rows))
    corpus = PackedRows.of_cache(bucket)
    corpus.take(np.arange(corpus.rows))
    # What is no Arrow file at all is noticed when it is opened.
    arrow.write_bytes(bytes(len(data)))
    with pytest.raises(CorruptError, match="now deleted"):
        PackedRows.of_cache(bucket)
    assert PackedRows.of_cache(bucket).digest(0, 12) == PackedRows.of_cache(disk).digest(0, 12)


def test_reading_a_remote_cache_copies_no_rows(disk: Path, home: Path) -> None:
    bucket = RemotePath(f"memory://read/{uuid.uuid4().hex}")
    upload(disk, bucket)
    same_rows(LogitCache(bucket), LogitCache(disk))
    copied = {name for folder in home.iterdir() for name in files_of(folder)}
    assert "prepared.json" in copied and any(name.startswith("tokenizer/") for name in copied)
    assert all(name == "prepared.json" or name.startswith("tokenizer/") for name in copied)


# --- both stages
# --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_text_to_student_through_a_bucket(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as on a disk, shard after shard; interrupted, repaired, and a student trained from it."""
    recipe = str(make_recipe(tmp_path / "tiny", train__steps=20, cache__shard_rows=8))  # every row once
    place_there = f"{s3.bucket}/{uuid.uuid4().hex}"
    there = ["--set", f"cache.location={place_there}", "--set", f"run_dir={tmp_path / 'remote'}"]
    for command in ("prepare", "cache", "train"):
        assert main([command, recipe]) == 0
    assert main(["train", recipe, *there]) == 3
    assert main(["prepare", recipe, *there]) == 0
    assert main(["cache", recipe, "--task", "1", "--num-tasks", "2", *there]) == 0
    assert main(["train", recipe, *there]) == 3
    assert "2 of 5 shards are committed" in capsys.readouterr().err
    assert main(["cache", recipe, *there]) == 0
    assert "2 of 5 shards found, 3 to do" in capsys.readouterr().out
    cache = RemotePath(f"{place_there}/cache")
    written = contents(cache)
    assert json.loads(written.pop("complete.json"))["shards"] == 5
    assert written == {name: data for name, data in files_of(tmp_path / "tiny/run/cache").items() if data}
    # Twice the same shard, and a damaged one.
    bad = cache / "shards/00003.zarr.zip"
    data = bytearray(bad.read_bytes())
    data[LogitCache(cache).records[3]["index"]["offset"]] ^= 1
    bad.write_bytes(bytes(data))
    assert main(["train", recipe, *there]) == 4
    assert main(["verify", str(cache)]) == 4
    assert "shard 00003" in capsys.readouterr().out
    assert main(["verify", str(cache), "--repair"]) == 0
    assert main(["cache", recipe, *there]) == 0
    assert main(["verify", str(cache)]) == 0
    assert main(["train", recipe, *there]) == 0
    for command in ("evaluate", "report", "status"):
        assert main([command, recipe, *there]) == 0
    one, other = (
        files_of(folder / "students/student/final") for folder in (tmp_path / "tiny/run", tmp_path / "remote")
    )
    differing = {name for name in one if one[name] != other.get(name)}
    assert differing <= {"training_args.bin"} and "model.safetensors" in one  # the former holds paths
    assert not (tmp_path / "remote/cache").exists()


def test_a_run_directory_must_be_local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(make_recipe(tmp_path))
    assert main(["prepare", recipe, "--set", "run_dir=s3://bucket/run"]) == 2
    assert "set cache.location to a URL" in capsys.readouterr().err


def test_a_store_that_does_not_answer_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    assert main(["verify", "s3://nowhere/cache"]) == 3
    fsspec.filesystem("s3").clear_instance_cache()
    error = capsys.readouterr().err
    assert "2 attempts failed" in error and "Traceback" not in error
