"""Changed text is noticed, whatever its size and times; text that was only copied or touched is not taken for changed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from logit_cache.base.errors import MismatchError, RecipeError
from logit_cache.corpus import parts
from logit_cache.corpus.parts import SourceFile, Sources
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.source_record import SOURCES, changed_part, facts_of, record_of
from logit_cache.corpus.sources import find_sources
from logit_cache.recipe.schema import CorpusConfig

from tests.corpus.test_chosen_positions import prepare
from tests.corpus.test_prepare import LINES, train_tokenizer, write_tar

TEXT = "\n".join(f"{LINES[number % 3]} number {number:02}" for number in range(40))
EDITED = TEXT.replace("fox", "box")
SPLIT = {"document_separator": "\n"}


def rows_of(tmp_path: Path, source: object, **settings: Any) -> PackedRows:
    return prepare(tmp_path, train_tokenizer(), source, **{**SPLIT, **settings})  # type: ignore[arg-type]


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every file that is read for its digest."""
    seen: list[str] = []
    real = SourceFile.digest
    monkeypatch.setattr(SourceFile, "digest", lambda self: seen.append(Path(self.name).name) or real(self))
    return seen


def store(kind: str, folder: Path, text: str) -> str:
    """The text as a source of this kind; the same size and, where that can be, the same time for texts of equal length."""
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"text": text.split("\n")}), folder / "d.parquet", compression="none")
        return str(folder / "d.parquet")
    if kind == "gzip":
        (folder / "d.txt.gz").write_bytes(gzip.compress(text.encode(), 0, mtime=0))
        return str(folder / "d.txt.gz")
    if kind == "tar":
        return f"tar://d.txt::{write_tar(folder / 'd.tar', {'d.txt': text.encode()})}"
    if kind == "zip":
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("d.txt"), text)
        return f"zip://d.txt::{folder / 'd.zip'}"
    if kind == "link":
        (folder / "real").write_text(text)
        if not (folder / "d.txt").exists():
            (folder / "d.txt").symlink_to(folder / "real")
        return str(folder / "d.txt")
    (folder / "d.txt").write_text(text)
    return str(folder) if kind == "directory" else str(folder / "d.txt")


@pytest.mark.parametrize("times", ["new times", "old times"])
@pytest.mark.parametrize("kind", ["file", "directory", "gzip", "parquet", "tar", "zip", "link"])
def test_text_of_equal_size_is_noticed(tmp_path: Path, kind: str, times: str) -> None:
    folder = tmp_path / "source"
    assert len(EDITED) == len(TEXT)
    source = store(kind, folder, TEXT)
    before = rows_of(tmp_path, source)
    stats = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
    store(kind, folder, EDITED)
    for file, old in stats.items():
        assert file.stat().st_size == old.st_size
        if times == "old times":
            os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))  # as rsync -t and cp -p do
    after = rows_of(tmp_path, source)
    assert after.meta["digest"] != before.meta["digest"]
    (after.path.parent / "manifest.json").write_text("{}")
    store(kind, folder, TEXT)
    with pytest.raises(MismatchError, match=r"sources \(.*d\..*\) differ"):
        rows_of(tmp_path, source)


def test_what_was_touched_or_copied_is_unchanged(tmp_path: Path, digests: list[str]) -> None:
    source = store("file", tmp_path / "source", TEXT)
    before = rows_of(tmp_path, source)
    stamp = before.stamp
    assert digests == ["d.txt"]
    assert rows_of(tmp_path, source).stamp == stamp
    assert digests == ["d.txt"], "an unchanged file is not read"
    os.utime(source)
    (before.path.parent / "manifest.json").write_text("{}")
    assert rows_of(tmp_path, source).stamp == stamp
    assert digests == ["d.txt"] * 2
    # Without the times, or with damaged ones, the content decides.
    for content in (None, "{", "[]"):
        (before.path / SOURCES).unlink() if content is None else (before.path / SOURCES).write_text(content)
        assert rows_of(tmp_path, source).stamp == stamp
    before.verify()
    # Rows that are made again of copied text are the ones that a cache was built on.
    shutil.rmtree(before.path)
    os.utime(source)
    assert rows_of(tmp_path, source).stamp == stamp


def test_files_behind_the_last_row_do_not_matter(tmp_path: Path, digests: list[str]) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(TEXT)
    before = rows_of(tmp_path, folder, max_rows=5)
    (before.path.parent / "manifest.json").write_text("{}")
    assert digests == ["a.txt"] and before.meta["settings"]["sources"]["whole"] is False
    (folder / "c.txt").write_text("another text")
    (folder / "d.txt").write_text("one more")
    assert rows_of(tmp_path, folder, max_rows=5).stamp == before.stamp
    (folder / "a.txt").write_text(EDITED)
    with pytest.raises(MismatchError, match=r"sources \(.*a.txt\)"):
        rows_of(tmp_path, folder, max_rows=5)


@pytest.mark.parametrize("change", ["more", "less", "renamed"])
def test_another_set_of_files_is_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(TEXT)
    before = rows_of(tmp_path, folder)
    (before.path.parent / "manifest.json").write_text("{}")
    if change == "more":
        (folder / "c.txt").write_text(TEXT)
    elif change == "less":
        (folder / "b.txt").unlink()
    else:
        (folder / "b.txt").rename(folder / "c.txt")
    with pytest.raises(MismatchError, match="sources"):
        rows_of(tmp_path, folder)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(store("file", tmp_path / "source", TEXT))
    real = parts.SourceFile.documents

    def documents(self: SourceFile, *of: Any) -> Any:
        yield from real(self, *of)
        source.write_text(EDITED)

    monkeypatch.setattr(SourceFile, "documents", documents)
    with pytest.raises(RecipeError, match=r"d\.txt was changed while it was read: run `prepare` again"):
        rows_of(tmp_path, source)
    assert not list((tmp_path / "run").rglob("*.arrow"))


def test_what_a_store_states_is_taken_for_the_content(tmp_path: Path, digests: list[str]) -> None:
    """An ETag stands for the bytes, which are not fetched again; a store without one has its bytes digested."""
    url = f"memory://sources/{uuid.uuid4().hex}.txt"
    with fsspec.open(url, "w") as file:
        file.write(TEXT)
    (found,) = find_sources(CorpusConfig(source=url)).parts
    assert isinstance(found, SourceFile)

    def record(**info: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Sources]:
        sources = Sources([found._replace(info={**found.info, **info})], begun=1, whole=True)
        facts = [facts_of(sources, 0)]
        return record_of(facts, True), facts, sources

    stated, facts, sources = record(ETag='"one"')
    assert digests == []
    assert changed_part(stated, facts, sources) is None
    assert changed_part(stated, None, sources) is None
    assert changed_part(stated, facts, record(ETag='"two"')[2]) == found.name
    assert digests == []
    assert len(json.dumps(record()[1])) > 64 and digests


def test_of_a_hub_data_set_the_commit_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = find_sources(CorpusConfig(source="some/where", format="hub", hub_revision="main"))
    sources.begun, sources.whole = 1, True

    class Builder:
        config_id = "default"
        hash = "0123"

    monkeypatch.setattr("datasets.load_dataset_builder", lambda *names, **options: Builder)
    facts = [facts_of(sources, 0)]
    record = record_of(facts, True)
    assert changed_part(record, facts, sources) is None
    Builder.hash = "4567"
    assert changed_part(record, facts, sources) == "some/where"

    def offline(*names: str, **options: str) -> None:
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    assert changed_part(record, facts, sources) is None, "rows that are there serve without the hub"
