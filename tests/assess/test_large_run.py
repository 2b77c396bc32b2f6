"""A run on many machines: arithmetic by hand, and unit costs by a clock that is made to tick."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from logit_cache.assess.cost import ModelShape, estimate
from logit_cache.assess.grid import Setting
from logit_cache.assess.large_run import LargeRun
from logit_cache.assess.unit_costs import UnitCosts, measure_unit_costs
from logit_cache.base.errors import RecipeError
from logit_cache.corpus.documents import texts
from logit_cache.corpus.labels import LOSS_MASK
from logit_cache.corpus.row_file import bytes_per_position
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.recipe.choices import Profile
from logit_cache.recipe.loading import load_recipe
from logit_cache.targets.supports import Support

from tests.helpers.tiny import make_recipe

COSTS = UnitCosts("a tokenizer", 500_000.0, 4e-6, 1e-6, 10, 4e8)
SIZES = {"shard_rows": 1000, "shards": 250_000, "corpus_size": 4.125e12}


def test_every_quantity_by_hand() -> None:
    shape = ModelShape(10**10, 10**10, 1, 0, 1, 1, 1)
    cost = estimate(
        shape,
        tokens=10**12,
        row_length=4000,
        bytes_per_position=50,
        num_gpus=32,
        shard_rows=1000,
        utilisation=0.4,
        capture_overhead=1.1,
    )
    run = LargeRun.of(cost, COSTS, **SIZES, nodes=4, student_rate=200_000)
    assert run.node_cores == 8 * 14 and cost.files == 500_010
    assert run.list_requests == 500
    assert run.prepare_hours == pytest.approx(1e12 / (0.8 * 500_000 * 4 * 112) / 3600)
    # A token takes 2e10 operations, 1.1 times.
    assert run.node_rate == pytest.approx(8 * 0.4 * 989e12 / 2.2e10)
    assert run.encoding_rate == pytest.approx(112 / 4e-6)
    # Two windows of 64 shards, with ten chunks of 12 bytes a row.
    assert run.reader_memory == 40 * 250_000 + 2 * 64 * 1000 * 10 * 12
    assert run.reader_disk == pytest.approx(2 * 64 * 2e8)
    assert run.verify_core_hours == pytest.approx(5e13 / 4e8 / 3600)
    assert run.verify_hours_from_afar == pytest.approx(5e13 / (112 * 85e6) / 3600)
    facts = run.facts()
    assert list(facts) == ["corpus", "objects", "a listing", "prepare", "writing", "reading", "a reader", "verify"]
    for name, measured, public in (
        ("corpus", "4.1 TB", "4.1 bytes a position"),
        ("prepare", "0.50 M tokens/s a core of a tokenizer", "DGX H100"),
        ("a listing", "500 requests, 50 s and $0.003", "1,000 names"),
        ("writing", "7.2 MB/s a node, on 0.6 of 112 cores (4.0 us a position)", "85 MB/s (S3)"),
        ("reading", "10.0 MB/s a node, on 0.2 of 112 cores (1.0 us a position)", "85 MB/s (S3)"),
        ("verify", "400 MB/s a core", "85 MB/s from S3"),
    ):
        assert measured in facts[name] and public in facts[name], facts[name]


def test_gpus_are_shared_by_whole_nodes() -> None:
    cost = estimate(ModelShape(1, 1, 1, 0, 1, 1, 1), tokens=1000, row_length=10, bytes_per_position=1, num_gpus=3)
    with pytest.raises(RecipeError, match="3 GPUs, 2 nodes"):
        LargeRun.of(cost, COSTS, **SIZES, nodes=2)
    assert LargeRun.of(cost, COSTS, **SIZES, nodes=3, node_cores=5).node_cores == 5


@pytest.mark.parametrize(
    ("support", "rank", "profile"),
    [(Support("topk", k=8), 4, "compact"), (Support("threshold", tau=0.1), 0, "fast")],
)
def test_unit_costs_are_processor_time_over_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, support: Support, rank: int, profile: Profile
) -> None:
    recipe = load_recipe(make_recipe(tmp_path, corpus__row_length=100))
    ticks = count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    costs = measure_unit_costs(recipe, Setting(support, profile=profile, rank=rank, step=0.1 * bool(rank)), 300)
    # Whatever is measured takes one second, on 81 rows of 100.
    assert costs.write_seconds == costs.read_seconds == 1 / 8100
    assert costs.tokenizer == "the teacher's tokenizer on the corpus"
    assert costs.tokens_per_second == sum(len(text.split()) for text in texts(recipe.corpus)), "a token is a word"
    assert 8100 < costs.verify_bytes_per_second < 8100 * 80, "a shard in one second"


def test_without_tokenizer_and_text_others_are_measured(tmp_path: Path) -> None:
    file = make_recipe(tmp_path)
    recipe = load_recipe(file, ["teacher.model=/nowhere", "corpus.source=/nowhere.txt"])
    costs = measure_unit_costs(recipe, Setting(Support("topk", k=4)), 300)
    assert costs.tokenizer == "a BPE (the teacher's tokenizer is not here) on Python's documentation"
    assert costs.tokens_per_second > 0


@pytest.mark.parametrize(("vocab_size", "masked"), [(300, False), (70_000, True)])
def test_the_size_of_rows_is_that_of_their_file(tmp_path: Path, vocab_size: int, masked: bool) -> None:
    rows, length = 4096, 100
    writer = RowWriter(tmp_path / "corpus", length, masked=masked, vocab_size=vocab_size)
    ids = np.zeros((rows, length), np.int32)
    writer.write_rows(ids, ids, np.ones_like(ids))
    writer.commit({})
    (file,) = (tmp_path / "corpus").glob("*.arrow")
    expected = bytes_per_position(vocab_size, LOSS_MASK if masked else None, length)
    # Buffers of Arrow are filled up, and a file has a head.
    assert file.stat().st_size == pytest.approx(expected * rows * length, rel=0.01)
