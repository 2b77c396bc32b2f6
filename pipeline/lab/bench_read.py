"""Random rows of a cache against memory-mapped raw arrays of the same numbers, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..corpus.labels import labels_of
from ..store.order import rows_at
from ..store.reader import LogitCache
from ..targets.sparse_targets import SparseTargets
from .scratch_cache import CacheMaker, repeat_rows
from .timing import in_turns, ratios

READ_ROWS = 1024
READ_BATCH = 32


def measure_read(maker: CacheMaker, cache: LogitCache, rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Positions per second from a cache of about `READ_ROWS` rows, which repeat those of `cache`, in both profiles."""
    rows = len(cache)
    times = -(-READ_ROWS // rows)
    columns = cache.columns(np.arange(rows))
    corpus = repeat_rows(scratch / "many", columns["input_ids"], columns["segment_ids"], rows * times)
    columns = corpus.columns(np.arange(rows))
    targets = cache.batch(np.arange(len(cache)))["targets"]
    compact, basis = maker.learned
    shape = None if compact.coordinates is None else replace(compact.coordinates, predicted=False)
    codecs = {"compact": compact, "fast": replace(maker.codec, profile="fast", coordinates=shape)}
    caches = {}
    for profile_name, codec in codecs.items():
        writer = maker.writer(scratch / profile_name, corpus, codec, rows)
        writer.begin(codec, basis)
        for shard in writer.pending():
            with writer.draft(shard) as draft:
                draft.add(targets, columns, [0.0] * rows)
                writer.commit(draft)
        caches[profile_name] = LogitCache(scratch / profile_name)
    order = rows_at(np.arange(corpus.rows), corpus.rows, seed=0)
    batches = [order[first : first + READ_BATCH] for first in range(0, corpus.rows, READ_BATCH)]
    raw = _raw_arrays(scratch, targets, times)

    def read(cache: LogitCache) -> None:
        for rows in batches:
            cache.batch(rows)

    def decoding(cache: LogitCache) -> Callable[[], None]:
        """Decoding alone, of rows that are read and checked already."""
        ready = []
        for rows in batches:
            columns = cache.columns(rows)
            labels = labels_of(columns)
            mask = cache.manifest.target_mask(labels, columns["segment_ids"])
            ready.append((cache.stored(rows), columns["input_ids"], mask, labels))

        def decode() -> None:
            for row in ready:
                cache.manifest.codec.decode(*row)

        return decode

    def copy(ready: bool) -> None:
        for rows in batches:
            for array, dtype in zip(raw, (torch.int64, torch.float32), strict=True):
                part = torch.from_numpy(array[rows])
                if ready:
                    part.to(dtype)

    jobs: dict[str, Callable[[], Any]] = {
        "read": partial(read, caches["compact"]),
        "read_fast": partial(read, caches["fast"]),
        "decode": decoding(caches["compact"]),
        "decode_fast": decoding(caches["fast"]),
        "memmap": partial(copy, False),
        "memmap_ready": partial(copy, True),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = in_turns(jobs, rounds)
    finally:
        torch.set_num_threads(threads)
    positions = caches["compact"].positions
    return {
        **{f"{name}_positions_per_second": [positions / s for s in taken] for name, taken in seconds.items()},
        "fast_vs_memmap": ratios(seconds["memmap"], seconds["read_fast"]),
        "fast_vs_memmap_ready": ratios(seconds["memmap_ready"], seconds["read_fast"]),
    }


def _raw_arrays(folder: Path, targets: SparseTargets, times: int) -> list[np.memmap[Any, np.dtype[Any]]]:
    """Token ids and log-probabilities as flat files of the narrowest plain types, memory-mapped."""
    ids = targets.token_ids.clamp(min=0).numpy().astype(np.uint16 if targets.vocab_size <= 2**16 else np.uint32)
    arrays = []
    for name, values in (("ids", ids), ("log_probs", targets.log_probs.numpy().astype(np.float16))):
        np.save(folder / f"{name}.npy", np.concatenate([values] * times))
        arrays.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
    return arrays
