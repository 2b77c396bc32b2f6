"""Copies of the shards of a remote cache: the rows are those of a direct read, whatever fails, and the limit holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import LogitCache, RowStream, ShardShuffle, Subset, collate
from logit_cache.base import places as storage
from logit_cache.base.durable import TEMPORARY
from logit_cache.base.places import RemotePath
from logit_cache.store import shard_readers
from logit_cache.store.batch import Batch
from logit_cache.store.samplers import StepBatches, training_order
from logit_cache.store.shard_order import ShardOrder
from torch.utils.data import DataLoader

from tests.conftest import files_of
from tests.helpers.slow_s3 import SlowS3, served
from tests.helpers.synthetic import make_cache

ROWS, SHARD_ROWS = 48, 4


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("disk") / "cache", rows=ROWS, shard_rows=SHARD_ROWS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "PAUSES", (0.001,) * 7)
    return tmp_path / "home"


@pytest.fixture
def bucket(disk: LogitCache) -> RemotePath:
    bucket = RemotePath(f"memory://afar/{uuid.uuid4().hex}")
    for name, data in files_of(Path(str(disk.path))).items():
        (bucket / name).write_bytes(data)
    return bucket


class Faults:
    """The memory file system, counting requests; some answers fail, are cut short or have a wrong byte."""

    def __init__(self, system: object, rates: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self._system, self._rates, self._rng, self._lock = system, rates, np.random.default_rng(0), threading.Lock()
        self.ranges: list[tuple[str, int, int]] = []
        self._wrong: set[tuple[str, int]] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._system, name)

    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int], **kwargs: object) -> list[bytes]:
        with self._lock:
            self.ranges += zip(paths, starts, ends, strict=True)
            found = self._system.cat_ranges(paths, starts, ends, **kwargs)  # type: ignore[attr-defined]
            asked = zip(paths, starts, found, strict=True)
            return [one if isinstance(one, Exception) else self._spoilt((path, at), one) for path, at, one in asked]

    def cat_file(self, path: str, **kwargs: object) -> bytes:
        with self._lock:
            return self._spoilt((path, 0), self._system.cat_file(path, **kwargs))  # type: ignore[attr-defined]

    def _spoilt(self, asked: tuple[str, int], data: bytes) -> bytes:
        fails, short, wrong = self._rng.random(3) < self._rates
        if wrong and asked in self._wrong:
            self._wrong.remove(asked)
            return data  # a wrong byte twice would be damage
        if fails:
            raise OSError("503 Slow Down")
        if short:
            return data[: int(self._rng.integers(len(data)))]
        if wrong:
            self._wrong.add(asked)
            place = int(self._rng.integers(len(data)))
            return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        return data


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Faults]:
    system, _ = storage._system("memory://afar")

    def install(*rates: float) -> Faults:
        found = Faults(system, rates or (0.0, 0.0, 0.0))  # type: ignore[arg-type]
        monkeypatch.setattr(storage, "_system", lambda url: (found, system._strip_protocol(url)))
        return found

    return install


def same(one: Batch, other: Batch) -> None:
    for name in ("input_ids", "labels", "segment_ids"):
        assert torch.equal(one[name], other[name])  # type: ignore[literal-required]
    for name in ("token_ids", "log_probs", "tail_curve", "mask", "label_log_probs"):
        assert torch.equal(getattr(one["targets"], name), getattr(other["targets"], name))


def in_batches(order: ShardShuffle, size: int = 4) -> Iterator[list[int]]:
    batch: list[int] = []
    for row in order:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []


def wait_until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline, "nothing is fetched"
        time.sleep(0.01)


def sizes(store: Path) -> Iterator[int]:
    """Of all whole copies, also those that are being written; one that ends meanwhile is left out."""
    for file in store.glob("*/*.zarr.zip*"):
        with suppress(FileNotFoundError):
            yield file.stat().st_size


def copies(store: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in store.glob("*/*.zarr.zip")}


def test_the_shards_of_an_order_are_copied_ahead_and_read_once(
    disk: LogitCache, bucket: RemotePath, faults: Callable[..., Faults], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    cache = LogitCache(bucket, local_store=store)
    asked = faults()
    order = ShardShuffle(cache, seed=1, window=3)
    for epoch in range(3):
        order.set_epoch(epoch)
        for number, batch in enumerate(in_batches(order)):
            ahead = 12 if epoch else min(3 * (number // 3 + 2), 12)  # of this window and the next
            wait_until(lambda ahead=ahead: len(copies(store)) >= ahead)
            same(cache.batch(batch), disk.batch(batch))
    whole = [(path, start) for path, start, end in asked.ranges if path.endswith(".zip") and start == 0]
    assert len(whole) == len(set(whole)) == 12
    again = faults()
    fresh = LogitCache(bucket, local_store=store)
    same(fresh.batch(np.arange(ROWS)), disk.batch(np.arange(ROWS)))
    assert not [path for path, _, _ in again.ranges if "shards" in path], "another process reads the copies"


@pytest.mark.parametrize("rates", [(0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.05), (0.1, 0.1, 0.02)])
def test_a_server_that_fails_cuts_and_spoils_answers_changes_no_row(
    disk: LogitCache, bucket: RemotePath, faults: Callable[..., Faults], rates: tuple[float, ...], tmp_path: Path
) -> None:
    cache = LogitCache(bucket, local_store=tmp_path / "store")
    faults(*rates)
    order = ShardShuffle(cache, seed=2, window=2)
    seen = []
    for batch in in_batches(order):
        same(cache.batch(batch), disk.batch(batch))
        seen += batch
        time.sleep(0.005)  # the copies come meanwhile
    assert sorted(seen) == list(range(ROWS))
    sums = {file.name: file.read_bytes() for file in Path(str(disk.path)).glob("shards/*.zip")}
    for file in (tmp_path / "store").glob("*/*.zarr.zip"):
        assert file.read_bytes() == sums[file.name]


@pytest.mark.parametrize("shards", [0, 1, 3, 5, 8])
def test_the_limit_holds_and_every_row_comes(
    disk: LogitCache, bucket: RemotePath, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From no shard at all to more than two windows of three."""
    size = max(file.stat().st_size for file in Path(str(disk.path)).glob("shards/*.zip"))
    store = tmp_path / "store"
    cache = LogitCache(bucket, local_store=store, local_bytes=shards * size + 1)
    order, kept = ShardShuffle(cache, seed=1, window=3), False
    for batch in in_batches(order):
        same(cache.batch(batch), disk.batch(batch))
        time.sleep(0.01)
        held = sum(sizes(store))
        assert held <= shards * size + 1
        kept |= bool(copies(store))  # the last one may have made room for a copy that the end of the order stopped
    assert len(copies(store)) <= shards
    assert kept == (shards > 0)


def test_of_shards_of_which_few_rows_are_needed_only_these_are_fetched(
    disk: LogitCache, bucket: RemotePath, faults: Callable[..., Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_readers, "_WHOLE", 1 / 2)
    monkeypatch.setattr(storage, "NEAR", 0)
    store = tmp_path / "store"
    cache = LogitCache(bucket, local_store=store)
    some = Subset(cache, np.arange(1, ROWS, SHARD_ROWS))
    faults()
    order = ShardShuffle(some, window=4)
    first = iter(order)
    next(first)
    wait_until(lambda: len(list(store.glob("*/*.rows"))) == 8)
    wait_until(lambda: all(file.stat().st_size for file in store.glob("*/*.rows")))
    assert not copies(store)
    time.sleep(0.1)
    ready = [int(file.name[:5]) for file in store.glob("*/*.rows")]
    asked = faults()
    again = LogitCache(bucket, local_store=store)
    same(again.batch(some._rows[ready]), disk.batch(some._rows[ready]))
    assert not [path for path, _, _ in asked.ranges if path.endswith(".zip")], "they are read from the copies"
    # Other rows of these shards are holes there.
    same(again.batch(np.arange(ROWS)), disk.batch(np.arange(ROWS)))
    for row in order:
        same(some.batch([row]), disk.batch([1 + row * SHARD_ROWS]))


@pytest.mark.parametrize("how", ["changed", "cut", "emptied", "record"])
def test_a_damaged_copy_is_read_past_and_replaced(
    disk: LogitCache, bucket: RemotePath, how: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    cache = LogitCache(bucket, local_store=store)
    assert cache.readers[0].fetch(2, np.arange(8, 12), [])
    (copy,) = store.glob("*/00002.zarr.zip")
    data = copy.read_bytes()
    if how == "record":
        copy.with_name("00002.json").write_text("{}")
    else:
        copy.write_bytes({"changed": bytes(byte ^ 1 for byte in data), "cut": data[:99], "emptied": b""}[how])
    fresh = LogitCache(bucket, local_store=store)
    same(fresh.batch(np.arange(8, 12)), disk.batch(np.arange(8, 12)))
    assert fresh.readers[0].fetch(2, np.arange(8, 12), [])
    assert copy.read_bytes() == data
    same(fresh.batch(np.arange(8, 12)), disk.batch(np.arange(8, 12)))


def test_damage_in_the_store_itself_is_told_and_not_copied(
    disk: LogitCache, bucket: RemotePath, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from logit_cache.base.errors import CorruptError

    bad = bucket / "shards/00005.zarr.zip"
    data = bytearray(bad.read_bytes())
    data[100] ^= 1
    bad.write_bytes(bytes(data))
    cache = LogitCache(bucket, local_store=tmp_path / "store")
    with pytest.raises(CorruptError, match="differs from the commit record"):
        cache.readers[0].fetch(5, np.arange(20, 24), [])
    assert not list((tmp_path / "store").glob("*/*"))
    with pytest.raises(CorruptError, match="00005"):
        for row in ShardShuffle(cache):
            cache.batch([row])
    assert "00005.zarr.zip" not in copies(tmp_path / "store")


KILLED = """
import sys, time, numpy as np
from logit_cache.store import local_store
from pathlib import Path
from logit_cache import LogitCache
from logit_cache.base.places import RemotePath

def slow(self, size=None):
    data = Path(sys.argv[1], "shards", self.name).read_bytes()
    yield data[:100]
    print("begun", flush=True)
    time.sleep(60)

RemotePath.pieces = slow
cache = LogitCache(sys.argv[1])
store = local_store.LocalStore(Path(sys.argv[2]), 2**30, RemotePath(sys.argv[3]), cache.manifest)
store.fetch(cache.records[3], [])
"""


def test_what_a_killed_process_has_begun_is_no_copy_and_makes_room(
    disk: LogitCache, bucket: RemotePath, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = [sys.executable, "-c", KILLED, str(disk.path), str(store), bucket.url]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ}) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == "begun\n"
        killed.send_signal(signal.SIGKILL)
    assert len(list(store.glob(f"*/*{TEMPORARY}*"))) == 1 and not copies(store)
    cache = LogitCache(bucket, local_store=store)
    assert cache.readers[0].fetch(3, np.arange(12, 16), [])
    assert len(copies(store)) == 1 and not list(store.glob(f"*/*{TEMPORARY}*"))
    same(cache.batch([13]), disk.batch([13]))


def test_threads_and_instances_that_copy_the_same_shard_ask_once(
    disk: LogitCache, bucket: RemotePath, faults: Callable[..., Faults], tmp_path: Path
) -> None:
    caches = [LogitCache(bucket, local_store=tmp_path / "store") for _ in range(4)]
    asked = faults()
    threads = [threading.Thread(target=cache.readers[0].fetch, args=(1, np.arange(4, 8), [])) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([1 for path, _, _ in asked.ranges if path.endswith("00001.zarr.zip")]) == 1
    assert copies(tmp_path / "store").keys() == {"00001.zarr.zip"}


def test_copies_used_longest_ago_make_room(disk: LogitCache, bucket: RemotePath, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in Path(str(disk.path)).glob("shards/*.zip"))
    store = tmp_path / "store"
    cache = LogitCache(bucket, local_store=store, local_bytes=3 * size + 1)
    for age, shard in ((50, 1), (40, 2), (30, 3)):
        assert cache.readers[0].fetch(shard, np.arange(shard * 4, shard * 4 + 4), [])
        (copy,) = store.glob(f"*/0000{shard}.zarr.zip")
        os.utime(copy, (time.time() - age,) * 2)
    assert cache.readers[0].local_store is not None
    cache.readers[0].local_store.touch(1)
    assert cache.readers[0].fetch(4, np.arange(16, 20), cache.readers[0].local_store.copies(2))
    assert copies(store).keys() == {"00001.zarr.zip", "00002.zarr.zip", "00004.zarr.zip"}
    everything = [copy for shard in range(12) for copy in cache.readers[0].local_store.copies(shard)]
    assert not cache.readers[0].fetch(5, np.arange(20, 24), everything)
    assert len(copies(store)) == 3


def test_a_store_that_is_slow_fails_and_cuts_answers_over_http(disk: LogitCache, tmp_path: Path) -> None:
    """The whole way: sockets, s3fs, retries, copies."""
    import fsspec

    with SlowS3(**served(Path(str(disk.path))), latency=0.001, fails=0.1, cuts=0.1, shortens=0.1) as s3:
        cache = LogitCache("s3://bucket", local_store=tmp_path / "store")
        rows = []
        for batch in in_batches(ShardShuffle(cache, seed=1, window=2)):
            same(cache.batch(batch), disk.batch(batch))
            rows += batch
        assert sorted(rows) == list(range(ROWS))
        assert s3.counts["failed"] and s3.counts["get"]
    fsspec.filesystem("s3").clear_instance_cache()


def test_workers_and_steps_read_the_copies(disk: LogitCache, bucket: RemotePath, tmp_path: Path) -> None:
    cache = LogitCache(bucket, local_store=tmp_path / "store")
    order = training_order(cache, 3)
    assert isinstance(order, ShardOrder)
    batches = StepBatches(order, 6, 3, source=cache)
    loader = DataLoader(cache, batch_sampler=batches, collate_fn=collate)
    rows = [row for batch in StepBatches(ShardOrder(disk.by_shard(), 3), 6, 3) for row in batch]
    assert sorted(rows) == list(range(ROWS))
    found = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(found, disk.batch(rows)["input_ids"])
    stream = RowStream(LogitCache(bucket, local_store=tmp_path / "other"), seed=3)
    streamed = iter(stream)
    first = next(streamed)
    wait_until(lambda: len(copies(tmp_path / "other")) == 12)
    found = torch.stack([row["input_ids"] for row in (first, *streamed)])
    assert sorted(stream.order(0).tolist()) == list(range(ROWS))
    assert torch.equal(found, disk.batch(stream.order(0))["input_ids"])
    assert not isinstance(training_order(disk, 3), ShardOrder)
    assert isinstance(training_order(disk, 3, 2), ShardOrder)
