"""Cost against size, on simulated caches: each measurement in a process of its own, at several sizes.

A simulated cache has one real shard, made of random logits; every other shard is hard links to its files with its own
commit record, and repeats the rows of the first. A reader sees a cache of the full size.

    open_seconds, open_bytes         time to open a cache, and memory that it adds to the process, by number of shards
    read_positions_per_second        random rows on one thread, by number of rows
    read_bytes                       memory of the process that reads them, without pages shared with files
    shuffle_positions_per_second     places in a shuffled order, by number of rows
    shuffle_bytes                    memory of the shuffling
    capture_bytes                    peak memory of stage one, by number of rows
    capture_positions_per_second     stage one, by number of processes that share the threads of one
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.durable import json_digest
from ..capture.shard_pass import fill_shards
from ..corpus.labels import IntArray
from ..corpus.rows import PackedRows
from ..models.output_layer import OutputLayer
from ..models.placement import Placement
from ..models.teacher import Teacher
from ..recipe.choices import DEFAULT_KNOTS
from ..recipe.paths import CachePaths
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..store.order import permuted, rows_at
from ..store.reader import LogitCache
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .scratch_cache import repeat_rows

SHARDS = (1_000, 10_000, 100_000)
ROWS = (1_000, 10_000, 100_000, 1_000_000)
SHUFFLED = (10**3, 10**6, 10**9)
CAPTURED = (100, 300, 1_000)
PROCESSES = (1, 2)
_VOCAB, _LENGTH, _READ = 4096, 128, 10_000
_IDENTITY = {"source": "simulated", "tokenizer": "", "vocab_size": _VOCAB}
Curve = dict[int, float]


def curves(folder: Path) -> dict[str, Curve]:
    """Every figure by size. `folder` must be empty: it takes a hundred thousand small files."""
    curves_by_name: dict[str, Curve] = {}

    def add(size: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            curves_by_name.setdefault(name, {})[size] = value

    for size in SHARDS:
        add(size, _alone(_opened, simulated_cache(folder / f"shards-{size}", rows=size, shard_rows=1, length=8, k=4)))
    for size in ROWS:
        cache = simulated_cache(folder / f"rows-{size}", rows=size, shard_rows=1000, length=_LENGTH, k=64)
        add(size, _alone(_read, cache))
    for size in SHUFFLED:
        add(size, _alone(_shuffled, size))
    for size in CAPTURED:
        add(size, _alone(_captured, folder / f"captured-{size}", size))
    for size in PROCESSES:
        speeds = [_captured_together(folder / f"processes-{size}-{turn}", size) for turn in range(3)]
        add(size, {"capture_positions_per_second": max(speeds)})
    return curves_by_name


def simulated_cache(folder: Path, *, rows: int, shard_rows: int, length: int, k: int) -> Path:
    """A cache of `rows` rows, a multiple of `shard_rows`, that repeats at most 50 different ones."""
    different = min(shard_rows, 50)
    ids = _random_ids(different, length)[np.arange(shard_rows) % different]
    writer, corpus = _new_cache(folder, ids, rows, shard_rows, k)
    manifest = writer.manifest
    torch.manual_seed(0)
    mask = torch.from_numpy(corpus.labels(np.arange(different)) >= 0)
    parts = [SparseTargets.from_logits(4 * torch.randn(length, _VOCAB), k=k, mask=row) for row in mask]
    targets = SparseTargets.stack(parts)[torch.arange(shard_rows) % different]
    writer.begin(manifest.codec.learn(targets, ids, rows * length))
    with writer.draft(0) as draft:
        draft.add(targets, corpus.columns(np.arange(shard_rows)), [0.0] * shard_rows)
        writer.commit(draft)
    paths = CachePaths(folder)
    first, record = paths.shard(0), LogitCache(folder, partial=True).records[0]
    for shard in range(1, manifest.num_shards):
        if shard_rows > 1:  # caches of one-row shards are only opened, which reads records alone
            os.link(first, paths.shard(shard))
        facts = {**record, "shard": shard, "rows": list(manifest.shard_range(shard))}
        del facts["record_sha256"]
        # Without fsync, which takes minutes for a hundred thousand records.
        whole = {**facts, "record_sha256": json_digest(facts)}
        paths.record(shard).write_text(json.dumps(whole), encoding="utf-8")
    return folder


def _random_ids(rows: int, length: int) -> IntArray:
    return np.random.default_rng(0).integers(0, _VOCAB, (rows, length), np.int32)


def _alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Figures of a function in a fresh process, where the library's log is off."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _opened(folder: Path) -> dict[str, float]:
    before, begin = own_memory(), time.perf_counter()
    cache = LogitCache(folder)
    seconds = time.perf_counter() - begin
    assert cache.complete
    return {"open_seconds": seconds, "open_bytes": own_memory() - before}


def _read(folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    cache = LogitCache(folder)
    order = rows_at(np.arange(_READ), len(cache), seed=0)
    batches = [order[first : first + 32] for first in range(0, len(order), 32)]
    seconds = []
    for part in np.array_split(np.arange(len(batches)), 5):
        begin = time.perf_counter()
        for number in part:
            cache.batch(batches[number])
        seconds.append((time.perf_counter() - begin) / len(part))
    # The first fifth also opens the shards.
    speed = 32 * (cache.row_length - 1) / min(seconds[1:])
    return {"read_positions_per_second": speed, "read_bytes": own_memory()}


def _shuffled(rows: int) -> dict[str, float]:
    places = np.random.default_rng(0).integers(0, rows, 1_000_000)
    before, begin = _peak_memory(), time.perf_counter()
    for part in np.array_split(places, 1000):
        permuted(part, rows, 0, 0)
    return {
        "shuffle_positions_per_second": len(places) / (time.perf_counter() - begin),
        "shuffle_bytes": _peak_memory() - before,
    }


def _captured(folder: Path, rows: int) -> dict[str, float]:
    """Stage one of a small teacher of random weights."""
    writer, corpus = _new_cache(folder, _random_ids(rows, _LENGTH), rows, shard_rows=16, k=64)
    fill_shards(_random_teacher(width=64, layers=1), corpus, writer, batch_rows=8)
    return {"capture_bytes": _peak_memory()}


def _captured_together(folder: Path, processes: int) -> float:
    """Positions per second of stage one, from the moment when all its processes have loaded their teacher."""
    threads = max(torch.get_num_threads() // processes, 1)
    writer, corpus = _new_cache(folder, _random_ids(32, _LENGTH), rows=32, shard_rows=4, k=64)
    writer.begin(writer.manifest.codec)  # else every process learns the codec
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        start = manager.Barrier(processes)
        tasks = [pool.submit(_task, folder, task, processes, threads, start) for task in range(processes)]
        return corpus.rows * corpus.row_length / max(task.result() for task in tasks)


def _task(folder: Path, task: int, num_tasks: int, threads: int, start: Any) -> float:
    """Seconds of one process of stage one."""
    torch.set_num_threads(threads)
    teacher, corpus = _random_teacher(width=512, layers=8), PackedRows.of_cache(folder)
    writer = CacheWriter(folder, Manifest.read(folder))
    start.wait()
    begin = time.perf_counter()
    fill_shards(teacher, corpus, writer, batch_rows=4, task=task, num_tasks=num_tasks)
    return time.perf_counter() - begin


def _new_cache(folder: Path, ids: IntArray, rows: int, shard_rows: int, k: int) -> tuple[CacheWriter, PackedRows]:
    """A cache without shards for `rows` rows that repeat those of `ids`."""
    corpus = repeat_rows(CachePaths(folder).corpus, ids, np.zeros_like(ids), rows)
    codec = TargetCodec(Support("topk", k=k), (*DEFAULT_KNOTS, 1.0), _VOCAB)
    return CacheWriter(folder, Manifest.create(_IDENTITY, corpus, codec, shard_rows, 0)), corpus


def _random_teacher(width: int, layers: int) -> Teacher:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    placement = Placement(torch.device("cpu"), torch.float32, "sdpa", "")
    return Teacher(model, OutputLayer.of(model), placement, _IDENTITY, source="")


def own_memory() -> float:
    """Resident bytes of this process, without pages of files, which the kernel may take back."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * int(status["RssAnon"].split()[0])


def _peak_memory() -> float:
    """Largest resident size of this process so far, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
