"""A shard while it is written: the same bytes however its rows arrive, and nothing left of what is given up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logit_cache.store import draft as draft_module
from logit_cache.store.reader import LogitCache
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.supports import Support

from tests.conftest import files_of
from tests.helpers.synthetic import make_cache

ROWS = 12


@pytest.fixture(params=[Support("topk", k=8), Support("threshold", tau=0.1)], ids=["fixed", "varying"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> LogitCache:
    # Without log-probabilities of labels: those that are read are rounded, and a row's loss is stored unrounded.
    sizes = {"rows": ROWS, "shard_rows": ROWS}
    return make_cache(tmp_path / "cache", **sizes, support=request.param, label_log_probs=False)


def write_again(cache: LogitCache, ends: list[int]) -> None:
    """Write the one shard of a cache from what it holds, in pieces that end at these rows."""
    batch, columns = cache.batch(range(ROWS)), cache.columns(range(ROWS))
    nats = [cache.records[0]["teacher_nats"], *[0.0] * (ROWS - 1)]
    (cache.path / "shards/00000.json").unlink()
    (cache.path / "shards/00000.zarr.zip").unlink()
    writer = CacheWriter(cache.path, cache.manifest)
    assert writer.pending() == [0]
    with writer.draft(0) as draft:
        for first, last in zip([0, *ends], ends, strict=False):
            part = {name: values[first:last] for name, values in columns.items()}
            draft.add(batch["targets"][first:last].trim(), part, nats[first:last])
        writer.commit(draft)


@pytest.mark.parametrize("ends", [[ROWS], list(range(1, ROWS + 1)), [5, 7, ROWS]], ids=str)
@pytest.mark.parametrize("threads", [1, 4])
def test_pieces_and_threads_do_not_change_a_byte(
    cache: LogitCache, ends: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_module, "_POSITIONS_OF_A_THREAD", 2 * cache.row_length)
    before, used = files_of(cache.path), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        write_again(cache, ends)
    finally:
        torch.set_num_threads(used)
    assert files_of(cache.path) == before


def test_a_draft_that_is_given_up_leaves_nothing(cache: LogitCache) -> None:
    before = files_of(cache.path)
    columns = cache.columns([0])
    with (
        pytest.raises(ValueError, match="the vocabulary has"),
        CacheWriter(cache.path, cache.manifest).draft(0) as draft,
    ):
        columns["input_ids"][0, 0] = 10**6
        draft.add(cache.batch([0])["targets"], columns, [0.0])
    assert files_of(cache.path) == before


def test_rows_that_are_missing_are_no_shard(cache: LogitCache) -> None:
    with pytest.raises(ValueError, match=f"3 rows of a shard of {ROWS}"):
        write_again(cache, [3])
    assert not (cache.path / "shards/00000.json").exists()
    assert not list((cache.path / "shards").iterdir())
