"""Raw documents from files and hub data sets.

Files are read through fsspec: directories, patterns, archives and URLs, compressed or not; text, JSON lines or Parquet.
"""

from __future__ import annotations

import errno
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig


def check_characters(text: str, where: str) -> str:
    """Return the text. Raises RecipeError for an unpaired surrogate, which JSON holds where an emoji was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"corpus: {where} contains an unpaired surrogate ({text[error.start]!a}), which no tokenizer reads: remove it"
        ) from error
    return text


def raw_documents(config: CorpusConfig) -> Iterator[tuple[Any, str]]:
    """Each document, as text or as a record with the columns that the recipe names, and its place in the source."""
    if config.format == "hub":
        yield from _hub_documents(config)
        return
    read = {"text": _text_documents, "jsonl": _jsonl_documents, "parquet": _parquet_documents}
    for file in _source_files(config):
        kind = config.format if config.format != "auto" else _kind(file.name)
        try:
            with file.open() as stream:
                yield from read[kind](stream, file.name, config)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, *_BAD_ARCHIVES, pa.ArrowInvalid) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise
            raise RecipeError(f"{file.name}: cannot be read as {kind}, is it damaged? ({error})") from error


def _text_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[tuple[str, str]]:
    data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}: not valid UTF-8 at byte {error.start} (line {line}): convert it, for example with iconv"
        ) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    for part in text.split(config.document_separator) if config.document_separator else [text]:
        yield part, name


def _jsonl_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{name}: not valid UTF-8 at byte {error.start} of line {number}: convert it, for example with iconv"
            ) from error
        except ValueError as error:
            raise RecipeError(f"{name}: line {number} cannot be read as jsonl ({error})") from error
        where = f"line {number} of {name}"
        yield _content(record if isinstance(record, dict) else {}, where, config), where


def _parquet_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[tuple[Any, str]]:
    table = pq.ParquetFile(stream)
    columns = table.schema_arrow.names
    wanted = config.content_columns()
    if not set(wanted) <= set(columns):
        _content(dict.fromkeys(columns), name, config)
    for batch in table.iter_batches(columns=wanted):
        for record in batch.to_pylist():
            yield _content(record, name, config), name


def _hub_documents(config: CorpusConfig) -> Iterator[tuple[Any, str]]:
    import datasets

    if not isinstance(config.source, str):
        raise RecipeError("corpus.source must be one dataset name with format = 'hub'")
    try:
        data = datasets.load_dataset(config.source, config.hub_config, split=config.hub_split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"corpus.source: data set {config.source!r} cannot be loaded: {first}") from error
    for number, record in enumerate(data):
        where = f"record {number} of {config.source}"
        yield _content(record, where, config), where


def _content(record: dict[str, Any], where: str, config: CorpusConfig) -> Any:
    """The text of a record, or the record itself where the recipe names messages or token ids."""
    columns = config.content_columns()
    value = record.get(columns[0])
    if columns == [config.text_column]:
        if not isinstance(value, str):
            raise RecipeError(
                f"corpus: {where} has no text in column {config.text_column!r} (columns: {', '.join(record) or 'none'}): "
                "set corpus.text_column"
            )
        return check_characters(value, where)
    missing = [name for name in columns if record.get(name) is None]
    if missing:
        raise RecipeError(f"corpus: {where} has no column {missing[0]!r} (columns: {', '.join(record) or 'none'})")
    return record


_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst")
_TARS = {".tgz": "gzip", ".tbz": "bz2", ".tbz2": "bz2", ".txz": "xz"}
"""Endings that mean .tar plus a compression."""
_BAD_ARCHIVES = (tarfile.TarError, zipfile.BadZipFile)


def _plain(name: str) -> str:
    """A file name in lower case, without the ending of its compression."""
    name = name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name


def _kind(name: str) -> str:
    """Format of a file, by its name."""
    ending = _plain(name).rpartition(".")[2]
    return {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "parquet": "parquet"}.get(ending, "text")


def _archive(name: str) -> str | None:
    """fsspec's protocol for an archive, by its name; None for other files."""
    plain = _plain(name)
    return "zip" if plain.endswith(".zip") else "tar" if plain.endswith((".tar", *_TARS)) else None


class _SourceFile(NamedTuple):
    """A file on any file system that fsspec knows."""

    system: Any
    name: str

    def open(self) -> IO[bytes]:
        if self.name.lower().endswith(".zst"):
            # fsspec needs another package for zstd, pyarrow has it.
            decompressed = pa.CompressedInputStream(self.system.open(self.name, "rb"), "zstd")
            return io.BufferedReader(decompressed)
        stream: IO[bytes] = self.system.open(self.name, "rb", compression="infer")
        return stream


def _source_files(config: CorpusConfig) -> list[_SourceFile]:
    """The files of all sources, sorted within each source; a directory means all files under it."""
    from fsspec.core import url_to_fs

    found: list[_SourceFile] = []
    for source in [config.source] if isinstance(config.source, str) else config.source:
        try:
            packed = next((kind for ending, kind in _TARS.items() if source.lower().endswith(ending)), None)
            # fsspec recognises .tar.gz by itself, .tgz it does not.
            options = {"tar": {"compression": packed}} if packed and source.startswith("tar://") else {}
            system, path = url_to_fs(source, **options)
            if system.isdir(path):
                names = system.find(path)
            elif any(sign in path for sign in "*?[") and not system.exists(path):
                names = [name for name in system.glob(path) if not system.isdir(name)]
            else:
                names = [path] if system.exists(path) else []
        except PermissionError:
            raise
        except (OSError, ValueError, ImportError, *_BAD_ARCHIVES) as error:
            raise RecipeError(f"corpus.source: cannot open {source!r} ({error})") from error
        if not names:
            raise RecipeError(f"corpus.source: no file matches {source!r}")
        for name in names:
            if (kind := _archive(name)) is not None:
                archive = source if name == path else name
                raise RecipeError(
                    f"corpus.source: {archive} is an archive: name the files inside, all of them by '{kind}://**::{archive}'"
                )
        found += [_SourceFile(system, str(name)) for name in sorted(names)]
    return found


def source_stamp(config: CorpusConfig) -> list[Any]:
    """Names and sizes of the source files, so that `prepare` detects changed text."""
    if config.format == "hub":
        return [config.source, config.hub_config, config.hub_split]
    stamp = []
    for file in _source_files(config):
        try:
            stamp.append([file.name, file.system.size(file.name)])
        except FileNotFoundError as error:
            raise RecipeError(f"corpus.source: {file.name} is a broken link: mend or remove it") from error
    return stamp


def shown_source(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)
