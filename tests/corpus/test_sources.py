"""What people give as a source: every format gives the same documents, directories without what is about them, and what
cannot be read is named for what it is."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import RecipeError
from logit_cache.corpus import formats
from logit_cache.corpus.sources import find_sources
from logit_cache.recipe.schema import CorpusConfig

from tests.corpus.test_prepare import write_gzip, write_zip

DOCUMENTS = ["the first,\nof two lines", 'a "quoted" one', "ä ö ü\tand 東京", "the last"]


def read(source: object, **settings: Any) -> list[Any]:
    config = CorpusConfig(source=source if isinstance(source, list) else str(source), **settings)
    return [document for document, _ in find_sources(config).documents(config)]


def refusal(source: object, **settings: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(source, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- formats ------------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.sampled_from(["a", "\r", "\n", "\r\n", "--", "-", "ä", "東", "\ufeff", "👩"]), max_size=40),
    separator=st.sampled_from(["-", "--", "\n\n", "\n--\n", None]),
    chunk=st.integers(1, 9),
)
def test_text_is_read_in_pieces_as_it_is_at_once(
    parts: list[str], separator: str | None, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(parts)
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        patch.setattr(formats, "_LARGEST_CHUNK", chunk)
        found = read(file, document_separator=separator)
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    assert found == (plain.split(separator) if separator else [plain])


def records() -> list[dict[str, object]]:
    return [{"id": number, "text": text} for number, text in enumerate(DOCUMENTS)]


def write_csv(file: Path, delimiter: str = ",") -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *((i, t) for i, t in enumerate(DOCUMENTS))])
    return file


def write_arrow(file: Path, new: Callable[..., Any]) -> Path:
    table = pa.table({"id": range(4), "text": DOCUMENTS})
    with new(str(file), table.schema) as out:
        out.write_table(table, max_chunksize=3)
    return file


WAYS: dict[str, Callable[[Path], object]] = {
    "csv": lambda folder: write_csv(folder / "d.csv"),
    "csv.gz": lambda folder: write_gzip(folder / "d.csv.gz", write_csv(folder / "d.csv").read_bytes()),
    "tsv": lambda folder: write_csv(folder / "d.tsv", "\t"),
    "Arrow stream": lambda folder: write_arrow(folder / "d.arrow", pa.ipc.new_stream),
    "Arrow file": lambda folder: write_arrow(folder / "d.arrow", pa.ipc.new_file),
    "feather": lambda folder: write_arrow(folder / "d.feather", pa.ipc.new_file),
    "list in a line": lambda folder: (folder / "d.json", (folder / "d.json").write_text(json.dumps(records())))[0],
    "list in lines": lambda folder: (
        folder / "d.json",
        (folder / "d.json").write_text(json.dumps(records(), indent=1)),
    )[0],
    "list.jsonl": lambda folder: (folder / "d.jsonl", (folder / "d.jsonl").write_text(json.dumps(records())))[0],
    "list.json.gz": lambda folder: write_gzip(folder / "d.json.gz", json.dumps(records()).encode()),
    "lines in .json": lambda folder: (
        folder / "d.json",
        (folder / "d.json").write_text("\n".join(map(json.dumps, records()))),
    )[0],
    "lines with a BOM": lambda folder: (
        folder / "d.jsonl",
        (folder / "d.jsonl").write_text("\n".join(map(json.dumps, records())), encoding="utf-8-sig"),
    )[0],
    "list with a BOM": lambda folder: (
        folder / "d.json",
        (folder / "d.json").write_text(json.dumps(records(), indent=1), encoding="utf-8-sig"),
    )[0],
    "save_to_disk": lambda folder: save(datasets.Dataset.from_list(records()), folder / "saved"),
    "save_to_disk, several files": lambda folder: save(
        datasets.Dataset.from_list(records()), folder / "saved", num_shards=3
    ),
    "save_to_disk, shuffled": lambda folder: save(
        datasets.Dataset.from_list([{}, *records()][::-1]).select([3, 2, 1, 0]), folder / "saved"
    ),
    "save_to_disk, splits": lambda folder: save(
        datasets.DatasetDict(
            test=datasets.Dataset.from_list([{"text": "no"}]), train=datasets.Dataset.from_list(records())
        ),
        folder / "saved",
    ),
}


def save(data: Any, folder: Path, **options: Any) -> Path:
    data.save_to_disk(str(folder), **options)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_documents(tmp_path: Path, way: str) -> None:
    assert read(WAYS[way](tmp_path)) == DOCUMENTS


@pytest.mark.parametrize("given", ["d.data", "folder"])
@pytest.mark.parametrize("form", ["csv", "arrow", "jsonl", "parquet", "text"])
def test_the_recipe_names_the_format_of_files_with_other_names(tmp_path: Path, form: str, given: str) -> None:
    file = tmp_path / "folder" / "d.data"
    file.parent.mkdir()
    if form == "csv":
        write_csv(file)
    elif form == "arrow":
        write_arrow(file, pa.ipc.new_file)
    elif form == "jsonl":
        file.write_text(json.dumps(records()))
    elif form == "parquet":
        pa.parquet.write_table(pa.table({"text": DOCUMENTS}), file)
    else:
        file.write_text("|".join(DOCUMENTS))
    settings = {"document_separator": "|"} if form == "text" else {}
    assert read(file if given == "d.data" else file.parent, format=form, **settings) == DOCUMENTS


def test_a_split_of_a_saved_data_set_is_named(tmp_path: Path) -> None:
    source = WAYS["save_to_disk, splits"](tmp_path)
    assert read(source, hub_split="test") == ["no"]
    assert "one of test, train" in refusal(source, hub_split="validation")


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    plain=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_a_json_list_is_read_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], indent: int | None, plain: bool, chunk: int
) -> None:
    file = tmp_path_factory.mktemp("list") / "d.json"
    value = [{"text": text, "more": [1, {"a": "],["}]} for text in texts]
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=plain), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        assert read(file) == texts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"text": "a"}', "behind record 1"),
        (b'[{"text": "a"},', "cut off"),
        (b'[{"text": "a"}, {"te', "behind record 1"),
        (b"[", "cut off"),
        (b'[{"text": "a"}][{"text": "b"}]', "more behind its JSON list"),
        (b'[{"text": "a"}]\n{"text": "b"}', "more behind its JSON list"),
        (b'[{"text": "a"} {"text": "b"}]', "behind record 1"),
        (b'[{"text": "a"}, 3]', "record 2 of"),
        (b'[["a"], ["b"]]', "a list of strings, not an object"),
        (b'{\n "data": [{"text": "a"}]\n}', "must be a list of records"),
        (b'{"text": "a"}\n["b"]', "line 2 of"),
        (b'{"text": "a"}\n3', "an integer, not an object"),
        (b'[{"text": "\xff"}]', "not valid UTF-8"),
    ],
)
def test_json_that_is_no_list_of_records(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    message = refusal(tmp_path / "d.json")
    assert said in message and "d.json" in message and "columns: none" not in message


@pytest.mark.parametrize(("content", "said"), [("a,b\n1,2,3\n", "line 2 has more fields"), ('text\n"x', "line 2")])
def test_damaged_csv(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "d.csv").write_text(content)
    message = refusal(tmp_path / "d.csv", text_column="b" if "b" in content else "text")
    assert said in message and "d.csv" in message


# --- directories ----------------------------------------------------------------------------------------------------------


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


LINE = '{"text": "a document"}\n'
ABOUT = {"README.md": "all about it " * 99, ".gitattributes": "x " * 999, "LICENSE": "be kind " * 999}
ABOUT |= {".git/config": "y " * 999, "_SUCCESS": "z" * 999, "dataset_infos.json": "[0" + ", 1" * 999 + "]"}


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        ({"data/a.jsonl": LINE}, {}, ["a document"]),
        ({"a.txt": "one", "b/c.txt": "two"}, {}, ["one", "two"]),
        ({"a.txt": "one", "b.TXT.gz": "two"}, {}, ["one", "two"]),
        ({"wiki_00": "one", "AA/wiki_01": "two", "part.2": "three"}, {}, ["two", "three", "one"]),
        (
            {"a.txt": "the greater part", "b.jsonl": LINE[:-1], "c.txt": "of the bytes"},
            {},
            ["the greater part", "of the bytes"],
        ),
        ({"a.txt": "short", "b.jsonl": LINE}, {}, ["a document"]),
        ({"a.txt": "short", "b.jsonl": LINE}, {"format": "text"}, ["short"]),
        ({"a.txt": "long " * 99, "b.jsonl": LINE}, {"format": "jsonl"}, ["a document"]),
        ({"a.txt": "one", "picture.png": "x" * 999, "model.safetensors": "x" * 999}, {}, ["one"]),
    ],
)
def test_of_a_directory_what_its_format_says(
    tmp_path: Path, files: dict[str, str], settings: dict[str, Any], expected: list[str]
) -> None:
    folder = put(tmp_path / "source", {**files, **ABOUT})
    for name in files:
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(files[name].encode()))
    assert read(folder, **settings) == expected
    found = find_sources(CorpusConfig(source=str(folder), **settings))
    assert len(found.parts) == len(expected)
    (line,) = found.notes
    assert str(folder) in line and "LICENSE" in line and "by a pattern" in line
    # Nothing is left out of what is named.
    assert "all about it" in read([f"{folder}/*.md"])[0]


@pytest.mark.parametrize("source", ["zip://**::{}.zip", "{}/**"])
def test_a_pattern_of_everything_is_a_directory(tmp_path: Path, source: str) -> None:
    folder = put(tmp_path / "source", {"a.txt": "one", "b/c.txt": "two", **ABOUT})
    write_zip(
        tmp_path / "source.zip",
        {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.*") if f.is_file()},
    )
    assert read(source.format(folder)) == ["one", "two"]


def test_documentation_alone_is_text(tmp_path: Path) -> None:
    assert read(put(tmp_path / "source", {"README.md": "one", "guide.md": "two", ".hidden.md": "no"})) == ["one", "two"]


def test_a_directory_that_is_all_read_is_passed_over_in_silence(tmp_path: Path) -> None:
    assert not find_sources(CorpusConfig(source=str(put(tmp_path / "source", {"a.txt": "one", "b.txt": "two"})))).notes


def test_a_directory_without_anything_to_read(tmp_path: Path) -> None:
    message = refusal(put(tmp_path / "source", {"a.png": "x", "b.mp3": "x", ".c": "x"}))
    assert "no file that can be read" in message and "a.png" in message and "damaged" not in message


# --- advice ---------------------------------------------------------------------------------------------------------------


def parquet(values: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"text": values}), sink)
    return sink.getvalue().to_pybytes()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema({"text": pa.string()})):
        pass
    return sink.getvalue().to_pybytes()


ADVICE: dict[str, tuple[str, bytes, dict[str, str], str]] = {
    "Arrow without its ending": ("d.dat", arrow(), {}, "corpus.format = 'arrow'"),
    "Parquet without its ending": ("d", parquet(["a"]), {}, "corpus.format = 'parquet'"),
    "Parquet as JSON": ("d.jsonl", parquet(["a"]), {}, "corpus.format = 'parquet'"),
    "UTF-16": ("d.txt", "some text".encode("utf-16"), {}, "iconv -f UTF-16"),
    "UTF-16 without a BOM": ("d.txt", "some text".encode("utf-16-le"), {}, "UTF-16"),
    "UTF-16 as JSON": ("d.jsonl", LINE.encode("utf-16"), {}, "iconv -f UTF-16"),
    "UTF-16 as CSV": ("d.csv", "text\na".encode("utf-16"), {}, "iconv -f UTF-16"),
    "Latin-1": ("d.txt", "na\xefve".encode("latin-1"), {}, "not valid UTF-8 at byte 2 (line 1): convert it"),
    "binary": ("d.txt", bytes(range(256)), {}, "a binary file"),
    "gzip without its ending": ("d.txt", gzip.compress(b"a"), {}, "name it .gz"),
    "zstd without its ending": ("d.jsonl", pa.Codec("zstd").compress(b"a", asbytes=True), {}, "name it .zst"),
    "PDF": ("d.txt", b"%PDF-1.7\n", {}, "PDF"),
    "no Parquet": ("d.parquet", b"text", {}, "damaged"),
    "empty Parquet": ("d.parquet", b"", {}, "it is empty"),
    "empty Arrow": ("d.arrow", b"", {}, "it is empty"),
    "list of integers": ("d.jsonl", b'{"text": [1, 2]}', {}, "a list of integers in column 'text', not text: set corpus.ids_column"),
    "list of messages": ("d.jsonl", b'{"text": [{"role": "user"}]}', {}, "set corpus.messages_column"),
    "list of strings": ("d.jsonl", b'{"text": ["a"]}', {}, "a list of strings in column 'text'"),
    "integer": ("d.jsonl", b'{"text": 3}', {}, "an integer in column 'text', not text"),
    "integers in Parquet": ("d.parquet", parquet([3]), {}, "an integer in column 'text', not text"),
    "missing": ("d.jsonl", b'{"body": "a"}', {}, "no column 'text' (columns: body): set corpus.text_column"),
    "conversations": ("d.jsonl", b'{"conversations": []}', {}, "corpus.messages_column = 'conversations'"),
    "missing messages": ("d.jsonl", b'{"a": 1}', {"messages_column": "m"}, "no column 'm' (columns: a): set corpus.messages_column"),
    "missing ids": ("d.parquet", parquet(["a"]), {"ids_column": "i"}, "no column 'i' (columns: text): set corpus.ids_column"),
    "null ids": ("d.jsonl", b'{"i": null}', {"ids_column": "i"}, "null in column 'i'"),
    "null messages": ("d.jsonl", b'{"m": null}', {"messages_column": "m"}, "null in column 'm'"),
    "ids by another name": ("d.jsonl", b'{"input_ids": [1]}', {}, "corpus.ids_column = 'input_ids'"),
    "bytes": ("d.parquet", parquet([b"na\xefve"]), {}, "not valid UTF-8 at byte 2"),
    "endless brackets": ("d.json", b"[" * 10**5, {}, "cannot be read"),
    "endless brackets in a line": ("d.jsonl", b'{"text":' + b"[" * 10**5, {}, "line 1 cannot be read"),
    "a column twice": ("d.csv", b"text,text\na,b", {}, "two columns have the same name"),
    "no record": ("d.jsonl", b'"text"', {}, "a string, not an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVICE)
def test_advice(tmp_path: Path, case: str) -> None:
    name, data, settings, said = ADVICE[case]
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name, **settings)
    assert said in message and name in message
    assert "columns: none" not in message


def test_a_name_of_the_hub_without_its_format() -> None:
    assert "corpus.format = 'hub'" in refusal("nobody/no-such-data-set")
    assert "hub" not in refusal("./nobody/nothing.txt")


def test_a_file_that_this_user_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.txt").write_text("a")
    real = open

    def refused(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).endswith("d.txt"):
            raise PermissionError(13, os.strerror(13), file)
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", refused)
    message = refusal(tmp_path / "d.txt")
    assert "make it readable" in message and "d.txt" in message and "run_dir" not in message


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_null_is_an_empty_document(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / f"d.{form}"
    file.write_bytes(parquet(["a", None]) if form == "parquet" else b'{"text": "a"}\n{"text": null}')
    with caplog.at_level("INFO"):
        assert read(file) == ["a", ""]
    assert f"2 of {file} has null in column 'text'" in caplog.text


def test_fields_that_tables_add_to_structs_are_dropped(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b"}}]
    table = pa.table({"calls": [calls], "other": [None]})
    assert table["calls"][0].as_py()[0]["arguments"] == {"x": 1, "y": None}
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", messages_column="calls") == [{"calls": calls}]


def test_bytes_are_text_where_they_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(parquet([text.encode() for text in DOCUMENTS]))
    assert read(tmp_path / "d.parquet") == DOCUMENTS


def test_a_pattern_of_several_formats_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "source", {"a.jsonl": LINE, "README.md": "all about it"})
    (note,) = find_sources(CorpusConfig(source=f"{folder}/*")).notes
    assert ".jsonl, .md" in note and len(read(f"{folder}/*")) == 2


class ClientError(Exception):
    """As client libraries have: no OSError, and several lines."""


@pytest.mark.parametrize("moment", ["find", "open", "read"])
def test_a_store_that_fails_is_told_in_one_line(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    url = "memory://failing/d.txt"
    with fsspec.open(url, "w") as file:
        file.write("some text")

    def failing(*args: Any, **options: Any) -> None:
        raise ClientError("403\nForbidden")

    owner, name = {
        "find": (MemoryFileSystem, "info"),
        "open": (MemoryFileSystem, "_open"),
        "read": (MemoryFile, "readinto"),
    }[moment]
    monkeypatch.setattr(owner, name, failing, raising=False)
    assert "403" in refusal(url)


@pytest.mark.parametrize("moment", ["load", "read"])
def test_a_hub_that_fails_is_told_in_one_line(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*names: Any, **options: Any) -> Any:
        if moment == "load":
            raise RuntimeError("Dataset scripts are no longer supported\nbut found it.py")
        return rest()

    def rest() -> Any:
        yield {"text": "a"}
        raise ClientError("")

    monkeypatch.setattr("datasets.load_dataset", stream)
    message = refusal("some/where", format="hub")
    assert ("scripts" if moment == "load" else "behind record 1: ClientError") in message
