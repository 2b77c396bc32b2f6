"""The automatic number of rows of a shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import RecipeError
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main
from logit_cache.store.manifest import Manifest
from logit_cache.store.reader import LogitCache
from logit_cache.store.shard_size import TEXT_BYTES, automatic_rows, estimated_bytes, shard_rows_of
from logit_cache.targets.supports import Support

from tests.helpers.synthetic import make_cache
from tests.helpers.tiny import make_recipe

SIZE = estimated_bytes(Support("topk", k=64), "compact") + TEXT_BYTES["compact"]


@given(rows=st.integers(1, 10**10), length=st.integers(2, 2**17), size=st.floats(1, 10**5, allow_nan=False))
def test_shards_are_neither_too_large_nor_too_many_nor_too_small(rows: int, length: int, size: float) -> None:
    found = automatic_rows(rows, length, size)
    assert found >= 1
    # Never more bytes than 256 MB, but of a single row.
    assert found == 1 or found * length * size <= 256e6
    if found * length * size < 0.5 * 256e6 and found > 1:
        # Smaller ones are for corpora of up to 256 shards, or have 2^17 positions.
        assert -(-rows // found) <= 256 or (found - 1) * length < 2**17
    if found * length < 2**17:
        assert (found + 1) * length * size > 256e6, "smaller than 2^17 positions only where that is 256 MB"


def test_a_corpus_of_a_million_million_tokens_is_less_than_half_a_million_files() -> None:
    rows = 10**12 // 4096
    shards = -(-rows // automatic_rows(rows, 4096, SIZE))
    assert 2 * shards < 10**6 and shards < 500_000


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(100, 128), (128 * 256, 128), (1000 * 256, 1000), (10**7, int(256e6 / (1024 * 81.9)))],
    ids=str,
)
def test_rows_of_1024_tokens(rows: int, expected: int) -> None:
    assert automatic_rows(rows, 1024, SIZE) == expected


@pytest.mark.parametrize("profile", ["compact", "fast"])
def test_the_estimate_is_near_what_is_stored(profile: str, tmp_path: Path) -> None:
    """Of a small vocabulary and small shards, whose metadata and rounding take their part: a factor of two."""
    cache = make_cache(tmp_path / "cache", rows=20, length=256, k=32, shard_rows=20, profile=profile)  # type: ignore[arg-type]
    estimate = estimated_bytes(Support("topk", k=32), profile) + TEXT_BYTES[profile]  # type: ignore[arg-type,index]
    assert 0.5 < cache.bytes / cache.positions / estimate < 2


def test_of_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path, cache__shard_rows="auto", cache__signals=["hidden.1"]))
    targets = estimated_bytes(Support("topk", k=recipe.cache.k), "compact", recipe.cache.rank) + TEXT_BYTES["compact"]
    # The signals of the tiny teacher: int8 states of 32 numbers, with their step.
    rows, length = 10**9, recipe.corpus.row_length
    assert shard_rows_of(recipe, recipe.paths.cache, rows) == automatic_rows(rows, length, targets + 34)
    heldout = (
        estimated_bytes(Support("topk", k=recipe.cache.heldout_k), "compact", recipe.cache.rank) + TEXT_BYTES["compact"]
    )
    assert shard_rows_of(recipe, recipe.paths.heldout, rows) == automatic_rows(rows, length, heldout)
    wrong = load_recipe(make_recipe(tmp_path / "wrong", cache__shard_rows="auto", cache__signals=["hidden.99"]))
    with pytest.raises(RecipeError, match=r"hidden\.99"):
        shard_rows_of(wrong, wrong.paths.cache, rows)


def test_a_cache_that_is_begun_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another version would choose another one."""
    file = make_recipe(tmp_path, cache__shard_rows="auto")
    assert main(["prepare", str(file)]) == 0
    monkeypatch.setattr("logit_cache.store.shard_size._FEWEST_POSITIONS", 64)
    assert main(["cache", str(file)]) == 0
    path = load_recipe(file).paths.cache
    assert Manifest.read(path).shard_rows == 4 and len(LogitCache(path)) > 8
    monkeypatch.undo()
    (path / "shards/00001.json").unlink()
    assert main(["cache", str(file)]) == 0
    assert Manifest.read(path).shard_rows == 4 and LogitCache(path).complete
