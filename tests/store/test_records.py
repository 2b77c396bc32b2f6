"""Commit records: one listing tells which there are, and each is checked before anything of its shard is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from logit_cache.base.errors import CorruptError, IncompleteError
from logit_cache.base.places import Place, RemotePath, each_name, read_all
from logit_cache.store.open_files import OPEN
from logit_cache.store.reader import LogitCache
from logit_cache.store.verify import drop_shard, verify

from tests.helpers.synthetic import make_cache
from tests.store.test_open_files import open_shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows in 3 shards of 5."""
    return make_cache(tmp_path_factory.mktemp("whole") / "cache").path


def test_opening_reads_no_record_and_reading_only_those_it_needs(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(files: Sequence[Place]) -> list[bytes | None]:
        asked.extend(file.name for file in files)
        return read_all(files)

    monkeypatch.setattr("logit_cache.store.records.read_all", counted)
    opened = LogitCache(whole)
    assert opened.complete and len(opened) == 12 and list(opened.records) == [0, 1, 2]
    assert asked == []
    opened.batch([7, 9, 5])
    opened.batch([6])
    assert asked == ["00001.json"]


def test_a_damaged_record_is_noticed_before_its_rows_are_used(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    file = folder / "shards/00001.json"
    file.write_text(file.read_text().replace('"positions": ', '"positions": 1'))
    opened = LogitCache(folder)
    opened.batch([0, 11])
    with pytest.raises(CorruptError, match="00001"):
        opened.batch([0, 5])
    with pytest.raises(CorruptError, match="00001"):
        _ = opened.positions
    assert list(verify(folder)) == [1]


def test_a_record_that_goes_away_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    opened = LogitCache(folder)
    (folder / "shards/00001.json").unlink()
    with pytest.raises(CorruptError, match="was deleted"):
        opened.batch([5])
    with pytest.raises(IncompleteError, match="2 of 3"):
        LogitCache(folder)
    partial = LogitCache(folder, partial=True)
    assert len(partial) == 7 and 1 not in partial.records and 2 in partial.records
    assert partial.row_numbers([4, 5, -1]).tolist() == [4, 10, 11]
    with pytest.raises(KeyError):
        _ = partial.records[1]


def test_no_more_files_are_open_than_the_process_may_have(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPEN, "most", 2)
    opened = LogitCache(whole)
    expected = LogitCache(whole).batch([0, 5, 10])["targets"].token_ids
    for row, ids in zip([0, 5, 10, 0, 10, 5], expected[[0, 1, 2, 0, 2, 1]], strict=True):
        assert (opened.batch([row])["targets"].token_ids[0] == ids).all()
        assert open_shards(whole) <= 2
    # Also where one batch is of more shards than that.
    assert (opened.batch([0, 5, 10])["targets"].token_ids == expected).all()
    assert open_shards(whole) <= 2


def test_no_more_shards_are_known_than_there_is_memory_for(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were read longest ago are forgotten, with their files, and read anew when they are wanted."""
    opened = LogitCache(whole)
    monkeypatch.setattr(opened.readers[0], "_most", 1)
    monkeypatch.setattr(OPEN, "most", 1)
    expected = LogitCache(whole).batch(range(12))["targets"].token_ids
    for row in (0, 5, 10, 11, 6, 1, 0):
        assert (opened.batch([row])["targets"].token_ids[0] == expected[row]).all()
        assert len(opened.readers[0]._readers) == 1
    assert open_shards(whole) == 1


def test_a_finished_cache_on_an_object_store_is_opened_without_a_listing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    bucket = RemotePath("memory://finished/cache")
    for file in filter(Path.is_file, whole.rglob("*")):
        (bucket / file.relative_to(whole).as_posix()).write_bytes(file.read_bytes())
    listed: list[str] = []

    def counted(folder: Place) -> Iterator[str]:
        listed.append(folder.name)
        return each_name(folder)

    monkeypatch.setattr("logit_cache.store.records.each_name", counted)
    cache = LogitCache(bucket)
    assert listed == ["shards"]
    cache.records.mark()
    again = LogitCache(bucket)
    assert listed == ["shards"] and list(again.records) == [0, 1, 2] and 3 not in again.records
    assert again.batch([11])["input_ids"].shape == (1, 16)
    drop_shard(bucket, 1)
    with pytest.raises(IncompleteError, match="2 of 3 shards"):
        LogitCache(bucket)
    partial = LogitCache(bucket, partial=True)
    partial.records.mark()
    assert not (bucket / "complete.json").exists()
    # The note of another cache says nothing.
    (bucket / "complete.json").write_bytes(b'{"identity_digest": "another", "shards": 3}')
    with pytest.raises(IncompleteError, match="2 of 3 shards"):
        LogitCache(bucket)
