"""How reading from afar behaves, measured: waiting of a training, and cost by the number of shards. No test.

    python -m tests.lab.remote_reading [wait] [curves] [mixing]

The store is a server of the S3 protocol on this machine that adds 50 ms to each answer and sends 100 MB/s in all.
Training is a loop in another process that takes a batch and then sleeps for as long as a student of 200,000 positions/s
takes. As on a GPU, torch's thread for `pin_memory` takes the batches from the loader's workers; here its page-locked
copies are plain ones.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logit_cache import LogitCache, ShardShuffle, collate
from logit_cache.base.durable import bytes_digest, json_digest
from logit_cache.lab.scale import own_memory, simulated_cache
from logit_cache.store.manifest import Manifest
from logit_cache.store.shard_order import RowsByShard, ShardOrder
from torch.utils.data import DataLoader

from tests.helpers.pinning import pinning_without_a_gpu
from tests.helpers.slow_s3 import SlowS3

LATENCY, RATE, SPEED = 0.05, 100e6, 200_000
SIZES = (10**3, 10**4, 10**5, 10**6)


@dataclass
class ManyShards:
    """A cache of `shards` shards made of one: every other repeats its rows. Objects are made when they are asked for."""

    folder: Path
    shards: int
    marked: bool = True
    """Whether the cache has the note that it is complete."""

    def __post_init__(self) -> None:
        self.one = LogitCache(self.folder)
        manifest = self.one.manifest
        self._record = self.one.records[0]
        meta = json.loads((self.folder / "corpus/prepared.json").read_text())
        meta["rows"] = self.shards * manifest.shard_rows
        prepared = json.dumps(meta).encode()
        facts = (manifest.identity, manifest.codec, meta["rows"], manifest.row_length, manifest.shard_rows)
        self.manifest = Manifest(*facts, bytes_digest(prepared))
        self._made = {"manifest.json": json.dumps(self.manifest.to_json()).encode(), "corpus/prepared.json": prepared}
        if self.marked:
            note = {"identity_digest": self.manifest.digest, "shards": self.shards}
            self._made["complete.json"] = json.dumps(note).encode()

    def get(self, name: str) -> bytes | Path | None:
        if name in self._made:
            return self._made[name]
        if name.startswith("shards/"):
            stem, _, kind = name.removeprefix("shards/").partition(".")
            if kind != "json":
                return self.folder / "shards/00000.zarr.zip"
            shard = int(stem)
            if shard >= self.shards:
                return None
            facts = {**self._record, "shard": shard, "rows": list(self.manifest.shard_range(shard))}
            del facts["record_sha256"]
            return json.dumps({**facts, "record_sha256": json_digest(facts)}).encode()
        file = self.folder / name
        return file if file.is_file() else None

    def names(self, prefix: str) -> Any:
        if prefix.startswith("shards"):
            stems = (f"shards/{shard:05}" for shard in range(self.shards))
            return [f"{stem}{kind}" for stem in stems for kind in (".json", ".zarr.zip")]
        found = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]
        return sorted(name for name in found if name.startswith(prefix))


@dataclass(frozen=True)
class Loop:
    """A training that reads from afar: its rows, and what loads them."""

    workers: int
    batch_rows: int
    shards: int = 40
    window: int = 4
    seconds: float = 10.0
    latency: float = LATENCY
    rate: float = RATE
    pin_memory: bool = True


def wait(folder: Path, loop: Loop) -> dict[str, float]:
    """Share of a step that waits for its batch, from the first step on, and without those of the first window.

    `thread_seconds`: processor time of the training's thread per batch. Without workers it is what reading and decoding
    takes of a core, whatever else the machine does; so many workers keep up as this is longer than a step.
    """
    objects = ManyShards(folder, loop.shards)
    with _served(objects, loop.latency, loop.rate) as (home, s3, pool):
        figures = pool.submit(_waited, home, loop).result()
        fetched = s3.counts["bytes"] / (folder / "shards/00000.zarr.zip").stat().st_size
        return {**figures, "shards_fetched": fetched, "requests": s3.counts.total() - s3.counts["bytes"]}


def _waited(home: str, loop: Loop) -> dict[str, float]:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    cache = LogitCache("s3://bucket", local_store=Path(home) / "store")
    opened = time.perf_counter() - begin
    order = ShardShuffle(cache, seed=1, window=loop.window)
    step = loop.batch_rows * cache.row_length / SPEED
    waits: list[float] = []
    thread_seconds = 0.0
    first_window = loop.window * cache.manifest.shard_rows // loop.batch_rows
    with pinning_without_a_gpu():
        settings: dict[str, Any] = {"batch_size": loop.batch_rows, "collate_fn": collate, "num_workers": loop.workers}
        batches = iter(DataLoader(cache, sampler=order, pin_memory=loop.pin_memory and loop.workers > 0, **settings))
        finish = time.perf_counter() + loop.seconds
        while time.perf_counter() < finish:
            asked, busy = time.perf_counter(), time.thread_time()
            batch = next(batches, None)
            waits.append(time.perf_counter() - asked)
            thread_seconds += time.thread_time() - busy
            if batch is None:
                break
            time.sleep(step)
            batch = None
        del batches
    later = waits[first_window:]
    return {
        "open_seconds": opened,
        "first_batch_seconds": waits[0],
        "step_seconds": step,
        "steps": len(waits),
        "thread_seconds": thread_seconds / len(waits),
        "wait_share": sum(waits) / (sum(waits) + step * len(waits)),
        "wait_share_after_first_window": sum(later) / max(sum(later) + step * len(later), 1e-9),
    }


@contextmanager
def _served(objects: ManyShards, latency: float, rate: float) -> Iterator[tuple[str, SlowS3, ProcessPoolExecutor]]:
    """A folder, the server, and a process of its own for who reads from it."""
    alone = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as home,
        SlowS3(objects.get, objects.names, latency, rate) as s3,
        ProcessPoolExecutor(1, alone) as pool,
    ):
        yield home, s3, pool


def opened(folder: Path, shards: int, marked: bool) -> dict[str, float]:
    """Opening, first batch and memory with so many shards, and the requests that they take."""
    with _served(ManyShards(folder, shards, marked), LATENCY, RATE) as (home, s3, pool):
        figures = pool.submit(_opened, home).result()
        return {**figures, "requests": s3.counts.total() - s3.counts["bytes"], "lists": s3.counts["list"]}


def _opened(home: str) -> dict[str, float]:
    torch.set_num_threads(1)
    before, begin = own_memory(), time.perf_counter()
    cache = LogitCache("s3://bucket", local_store=Path(home) / "store")
    open_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    order = ShardShuffle(cache)
    row = next(iter(order))
    order_seconds = time.perf_counter() - begin
    cache.batch([row])
    first = time.perf_counter() - begin
    memory = own_memory() - before
    begin, rows = time.perf_counter(), []
    for row, _ in zip(order, range(20_000), strict=False):
        rows.append(row)
    figures = {"open_seconds": open_seconds, "order_seconds": order_seconds, "first_batch_seconds": first}
    return {**figures, "memory_MB": memory / 1e6, "us_per_row_of_order": (time.perf_counter() - begin) / 20_000 * 1e6}


def mixing(window: int | None, *, shards: int = 4096, shard_rows: int = 256, batch: int = 32) -> dict[str, float]:
    """How often two rows of one batch, and of neighbouring batches, come from one shard; None: a full shuffle."""
    sizes = np.full(shards, shard_rows)
    order = ShardOrder(RowsByShard(sizes, np.zeros_like(sizes)), 0, shards if window is None else window)
    found = (order.rows_at(np.arange(order.rows)) // shard_rows).reshape(-1, batch)
    inside = (found[:, :, None] == found[:, None, :]).sum((1, 2)) - batch
    next_to = (found[:-1, :, None] == found[1:, None, :]).sum((1, 2))
    pairs = inside.mean() / (batch * (batch - 1))
    return {
        "same_shard": pairs,
        "same_shard_next_batch": next_to.mean() / batch**2,
        "variance": 1 + (batch - 1) * pairs,
    }


def shown(name: str, measure: Callable[[], dict[str, float]]) -> None:
    figures = {key: float(f"{value:.4g}") for key, value in measure().items()}
    print(json.dumps({"what": name, **figures}), flush=True)


def main() -> None:
    parts = sys.argv[1:] or ["mixing", "curves", "wait"]
    with tempfile.TemporaryDirectory() as scratch:
        if "mixing" in parts:
            for window in (1, 2, 4, 8, 16, 32, 64, 256, None):
                shown(f"mixing, w = {window}", lambda window=window: mixing(window))
        if "curves" in parts:
            small = simulated_cache(Path(scratch) / "small", rows=256, shard_rows=256, length=128, k=16)
            for size in SIZES:
                shown(f"{size:,} shards", lambda size=size: opened(small, size, True))
            for size in SIZES[:2]:
                shown(f"{size:,} shards, without the note", lambda size=size: opened(small, size, False))
        if "wait" in parts:
            whole = simulated_cache(Path(scratch) / "whole", rows=256, shard_rows=256, length=512, k=16)
            far = [Loop(workers=2, batch_rows=8), Loop(workers=2, batch_rows=32)]
            near = [replace(loop, latency=0.0, rate=float("inf")) for loop in far]  # what this machine adds
            others = [replace(far[0], pin_memory=False), replace(far[0], workers=0)]  # what thread and workers save
            for loop in (*far, *near, *others):
                shown(f"{loop}", lambda loop=loop: wait(whole, loop))


if __name__ == "__main__":
    main()
