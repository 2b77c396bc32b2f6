"""What is committed is checked, and how far the check is shows. Damage of all kinds is in tests/stages/test_damage.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from logit_cache.base import progress
from logit_cache.base.errors import StorageError
from logit_cache.base.places import Place
from logit_cache.stages.app import main
from logit_cache.store.manifest import Manifest
from logit_cache.store.verify import verify

from tests.helpers.synthetic import make_cache


def test_verify_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "cache", rows=8, shard_rows=4)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(["verify", str(cache.path)]) == 0
    assert "verify cache: 50 %  1 of 2 shards" in capsys.readouterr().out


@pytest.mark.parametrize("available", [1, 3])
def test_shards_are_checked_at_once_and_named_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int
) -> None:
    cache = make_cache(tmp_path / "cache", rows=40, shard_rows=1)
    monkeypatch.setattr("logit_cache.store.verify.cores", lambda: available)
    monkeypatch.setattr("logit_cache.store.verify._SHARDS_OF_A_THREAD", 3)
    assert verify(cache.path) == {}
    for shard in (39, 7, 6):
        file = cache.path / f"shards/{shard:05}.zarr.zip"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    (cache.path / "shards/00020.json").unlink()
    bad = verify(cache.path)
    assert list(bad) == [6, 7, 39] and all(f"{shard:05}" in said for shard, said in bad.items())


def test_what_is_no_damage_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "cache", rows=40, shard_rows=1)
    asked: list[int] = []

    def failing(cache: Place, manifest: Manifest, record: dict[str, Any]) -> None:
        asked.append(record["shard"])
        raise StorageError("the store does not answer")

    monkeypatch.setattr("logit_cache.store.verify.verify_shard", failing)
    monkeypatch.setattr("logit_cache.store.verify.cores", lambda: 1)
    with pytest.raises(StorageError, match="does not answer"):
        verify(cache.path)
    assert len(asked) < 40
