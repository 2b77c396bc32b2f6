"""Digests that are known are not computed again, and those of changed files never believed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from logit_cache.base import digests
from logit_cache.base.digests import known_digests


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read; all count as large, and as settled once they are 50 ms old."""
    done: list[Path] = []
    compute = digests.file_digest

    def counted(file: Path) -> str:
        done.append(file)
        return compute(file)

    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "file_digest", counted)
    monkeypatch.setattr(digests, "_LARGE", 0)
    monkeypatch.setattr(digests, "_SETTLED_NS", 50_000_000)
    return done


def settled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    time.sleep(0.1)
    return path


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    files = [settled(tmp_path / name, name.encode()) for name in ("one", "two")]
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    for _ in range(3):
        assert known_digests(files) == expected
    assert sorted(reads) == files


def rewritten(file: Path) -> None:
    file.write_bytes(b"changed!")


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"changed!")
    other.replace(file)


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_changed_file_of_equal_size_and_time_is_read_again(
    change: Callable[[Path], None], tmp_path: Path, reads: list[Path]
) -> None:
    file = settled(tmp_path / "file", b"original")
    before = file.stat()
    known_digests([file])
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert known_digests([file]) == [hashlib.sha256(b"changed!").hexdigest()]
    assert len(reads) == 2


def test_the_digest_of_a_fresh_file_is_not_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**12)
    file = settled(tmp_path / "file", b"original")
    known_digests([file])
    known_digests([file])
    assert len(reads) == 2


def test_of_several_that_ask_at_once_one_reads(tmp_path: Path, reads: list[Path]) -> None:
    file = settled(tmp_path / "file", b"x" * 2**20)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: known_digests([file])[0], range(8)))
    assert found == {hashlib.sha256(file.read_bytes()).hexdigest()}
    assert len(reads) == 1


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"stamp": 1}'])
def test_a_damaged_note_is_no_obstacle(damage: bytes, tmp_path: Path, reads: list[Path]) -> None:
    file = settled(tmp_path / "file", b"original")
    expected = known_digests([file])
    (note,) = (tmp_path / "home/digests").glob("*.json")
    note.write_bytes(damage)
    assert known_digests([file]) == expected
    assert len(reads) == 2


def test_no_place_for_notes_is_no_obstacle(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "taken"))
    file = settled(tmp_path / "file", b"original")
    assert known_digests([file]) == [hashlib.sha256(b"original").hexdigest()]
