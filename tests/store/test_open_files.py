"""What a cache holds in memory and open: shared by all caches of a process, and left out where one goes to another."""

from __future__ import annotations

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import Mixture
from logit_cache.corpus.rows import PackedRows
from logit_cache.lab.text_rows import TextRows
from logit_cache.store.open_files import OPEN

from tests.helpers.synthetic import make_cache


def open_shards(folder: Path) -> int:
    """Files of shards below a folder that this process has open."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the directory's own
            names.append(str(link.readlink()))
    return sum(name.startswith(str(folder)) and name.endswith(".zarr.zip") for name in names)


def test_all_caches_of_a_process_share_its_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [make_cache(tmp_path / str(number), rows=24, shard_rows=3, seed=number) for number in range(3)]
    monkeypatch.setattr(OPEN, "most", 5)
    mixed = Mixture(caches, [1, 1, 1], seed=0)
    rows = np.random.default_rng(0).integers(0, len(mixed), 64)
    expected = mixed.batch(rows)["targets"].token_ids
    assert 0 < open_shards(tmp_path) <= 5
    # In threads a file stays open while it is read.
    with ThreadPoolExecutor(4) as threads:
        for batch in threads.map(mixed.batch, [rows] * 12):
            assert torch.equal(batch["targets"].token_ids, expected)
    assert open_shards(tmp_path) <= 5
    del mixed, caches, batch
    gc.collect()
    assert open_shards(tmp_path) == 0, "a cache that nobody has any more holds no file"


def test_a_cache_goes_to_another_process_without_what_was_read(tmp_path: Path) -> None:
    """Nor with the rows of a corpus, which that process maps itself."""
    sizes = []
    for rows in (10, 400):
        cache = make_cache(tmp_path / str(rows), rows=rows, length=64, shard_rows=200, profile="fast")
        expected = cache.batch(range(rows))
        corpus = PackedRows.of_cache(cache.path)
        sent = [pickle.dumps(value) for value in (cache, corpus, TextRows(corpus))]
        sizes.append([len(data) for data in sent])
        again, same_corpus, text = (pickle.loads(data) for data in sent)
        assert torch.equal(again.batch(range(rows))["targets"].log_probs, expected["targets"].log_probs)
        assert np.array_equal(same_corpus.take(np.arange(rows))[0], expected["input_ids"].numpy())
        assert torch.equal(text.batch(range(rows))["labels"], expected["labels"])
    assert all(large < small + 500 for small, large in zip(*sizes, strict=True)), sizes
