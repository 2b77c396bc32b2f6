"""Simulated caches of any size read like real ones, and the shapes of the curves that are drawn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache.lab.scale import simulated_cache
from logit_cache.stages.app import main
from logit_cache.store.reader import LogitCache


def test_a_simulated_cache_repeats_its_first_shard(tmp_path: Path) -> None:
    cache = LogitCache(simulated_cache(tmp_path / "cache", rows=12, shard_rows=4, length=8, k=6))
    assert cache.complete and len(cache) == 12 and len(cache.records) == 3
    batch = cache.batch(np.arange(12))
    for row in range(4, 12):
        for part in ("token_ids", "log_probs", "tail_curve"):
            values = getattr(batch["targets"], part)
            assert torch.equal(values[row], values[row % 4]), part
        assert torch.equal(batch["input_ids"][row], batch["input_ids"][row % 4])


def test_it_is_measured_before_there_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_cache.lab.scale.curves", lambda folder: {"seconds to open": {1: 0.1}})
    assert main(["bench", "demo", "--scale", "--set", f"run_dir={tmp_path / 'run'}"]) == 0
