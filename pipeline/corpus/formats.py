"""Formats of source files: an open file -> its documents, each with its place.

A document is text, or a record with the columns that the recipe names. Text files, JSON lines and JSON lists, CSV,
Parquet and Arrow are read a piece at a time.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig

Documents = Iterator[tuple[Any, str]]
"""Text, None where a record has null in its place, or a record; and its place in the source for messages."""


KINDS = {
    "jsonl": ("jsonl", "ndjson", "json"),
    "csv": ("csv", "tsv"),
    "parquet": ("parquet", "pq"),
    "arrow": ("arrow", "feather"),
}
"""Formats of records, and the endings of their files."""

_MAGIC = {
    b"PAR1": "a Parquet file: set corpus.format = 'parquet', or name it .parquet",
    b"ARROW1": "an Arrow file: set corpus.format = 'arrow', or name it .arrow",
    b"\xff\xff\xff\xff": "an Arrow stream: set corpus.format = 'arrow', or name it .arrow",
    b"\xff\xfe": "UTF-16 text: convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed by gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: name it .zst",
    b"\xfd7zXZ": "compressed by xz: name it .xz",
    b"BZh": "compressed by bzip2: name it .bz2",
    b"PK\x03\x04": "a zip archive (or an office document): name it .zip, or export its text",
    b"%PDF": "a PDF document: extract its text first",
}
"""First bytes of files that are no text, and what they are."""
_BETWEEN = re.compile(r"[ \t\r\n]*([\[,\]])[ \t\r\n]*")
"""What stands before a record of a JSON list, or ends the list."""
_CHUNK, _LARGEST_CHUNK = 2**16, 2**22


def check_characters(text: str, where: str) -> str:
    """Return the text. Raises RecipeError for an unpaired surrogate, which JSON holds where an emoji was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"corpus: {where} contains an unpaired surrogate ({text[error.start]!a}), which no tokenizer reads: remove it"
        ) from error
    return text


def head_of(stream: IO[bytes]) -> bytes:
    """Some first bytes of a buffered stream, which stay to be read."""
    head: bytes = stream.peek(4096)  # type: ignore[attr-defined]
    return head[:4096]


def check_text(head: bytes, name: str) -> None:
    """Raises RecipeError for the first bytes of a file that is no UTF-8 text, saying what it is."""
    what = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if what is None and b"\0" in head:
        what = "a binary file or UTF-16 text: convert it to UTF-8 text, or leave it out of corpus.source"
    if what is not None:
        raise RecipeError(f"{name}: not valid UTF-8, it looks like {what}")


def _decoded(data: bytes, name: str, line: int, offset: int = 0) -> str:
    """UTF-8 bytes as text; `line` and `offset` are the place of the first one. Raises RecipeError for others."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise RecipeError(
            f"{name}: not valid UTF-8 at byte {offset + error.start} (line {line}): convert it, for example with iconv"
        ) from error


def _text(stream: IO[bytes], name: str, config: CorpusConfig) -> Documents:
    texts, separator = _with_plain_ends(_pieces(stream, name)), config.document_separator
    if not separator:
        yield "".join(texts), name
        return
    waiting, tail = list[str](), ""
    for text in texts:
        waiting.append(text)
        if separator in tail + text:
            *documents, tail = "".join(waiting).split(separator)
            waiting = [tail]
            for document in documents:
                yield document, name
        else:
            tail += text
        tail = tail[max(len(tail) - len(separator) + 1, 0) :]  # a separator may begin there
    yield "".join(waiting), name


def _with_plain_ends(texts: Iterable[str]) -> Iterator[str]:
    """The same text with line feeds as the ends of lines."""
    held = ""
    for text in texts:
        text, held = held + text, ""
        if text.endswith("\r"):
            text, held = text[:-1], "\r"  # its line feed may follow
        yield text.replace("\r\n", "\n")
    yield held


def _lines(stream: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a text file, with their ends. Raises RecipeError for what is no UTF-8 text."""
    offset = 0
    for number, line in enumerate(stream, 1):
        text = _decoded(line, name, number, offset)
        offset += len(line)
        yield text.removeprefix("\ufeff") if number == 1 else text


def _jsonl(stream: IO[bytes], name: str, config: CorpusConfig) -> Documents:
    if is_json_list(head_of(stream)):
        yield from _json_list(stream, name, config)
        return
    for number, line in enumerate(_lines(stream, name), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            advice = ": a file of one JSON value must be a list of records" if line.strip() == "{" else ""
            raise RecipeError(f"{name}: line {number} cannot be read as jsonl ({error}){advice}") from error
        where = f"line {number} of {name}"
        yield content(record, where, config), where


def is_json_list(head: bytes) -> bool:
    """Whether a file with these first bytes is one JSON list."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_list(stream: IO[bytes], name: str, config: CorpusConfig) -> Documents:
    """The records of a file that is one JSON list."""
    decode, text, place, number, sign, problem = json.JSONDecoder().raw_decode, "", 0, 0, "[", "it has no end"
    pieces = _pieces(stream, name)
    for piece in chain(pieces, [""]):
        text, place = text[place:] + piece, 0
        while (found := _BETWEEN.match(text, place)) is not None:
            if found[1] == "]" or (number == 0 and text.startswith("]", found.end())):
                if text[found.end() :].strip(" \t\r\n]") or any(more.strip() for more in pieces):
                    raise RecipeError(f"{name}: there is more behind its JSON list: one list is read, or JSON lines")
                return
            try:
                record, place = decode(text, found.end())
            except (ValueError, RecursionError) as error:
                problem = str(error)
                break  # the record goes on in the next piece
            if found[1] != sign:
                raise RecipeError(f"{name}: {found[1]!r} in place of {sign!r} behind record {number} of its JSON list")
            number, sign = number + 1, ","
            where = f"record {number} of {name}"
            yield content(record, where, config), where
    raise RecipeError(f"{name}: its JSON list cannot be read behind record {number}, is it cut off? ({problem})")


def _pieces(stream: IO[bytes], name: str) -> Iterator[str]:
    """The text of a file, a piece at a time; pieces grow, so that what waits for its end is copied a few times only.

    Raises RecipeError for what is no UTF-8 text.
    """
    data, size, offset, line = b"", _CHUNK, 0, 1
    while more := stream.read(size):
        data += more
        # A character may go on in the next piece.
        end = len(data) - next((n for n in (1, 2, 3) if n <= len(data) and data[-n] >= 0xC0), 0)
        text = _decoded(data[:end], name, line, offset)
        yield text.removeprefix("\ufeff") if offset == 0 else text
        line, offset, data = line + data.count(b"\n", 0, end), offset + end, data[end:]
        size = min(2 * size, _LARGEST_CHUNK)
    text = _decoded(data, name, line, offset)
    yield text.removeprefix("\ufeff") if offset == 0 else text


def _csv(stream: IO[bytes], name: str, config: CorpusConfig) -> Documents:
    csv.field_size_limit(2**31 - 1)  # a field is a document
    reader = csv.DictReader(_lines(stream, name), delimiter="\t" if ".tsv" in name.lower() else ",", strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise RecipeError(f"{name}: two columns have the same name ({', '.join(names)})")
        for record in reader:
            where = f"line {reader.line_num} of {name}"
            if None in record:
                raise RecipeError(f"{name}: line {reader.line_num} has more fields than the first line has names")
            yield content(record, where, config), where
    except csv.Error as error:
        raise RecipeError(f"{name}: line {reader.reader.line_num} cannot be read as CSV ({error})") from error


def parquet_documents(
    stream: IO[bytes], name: str, config: CorpusConfig, wanted: Callable[[int], bool] = lambda place: True
) -> Documents:
    """The documents of the row groups that are `wanted` by where they begin in the file."""
    table = pq.ParquetFile(stream)
    columns = _columns(table.schema_arrow.names, name, config)
    groups = [number for number in range(table.num_row_groups) if wanted(_place_of_group(table.metadata, number))]
    if groups:
        yield from _batches(table.iter_batches(columns=columns, row_groups=groups), name, config)


def _place_of_group(metadata: Any, number: int) -> int:
    """Where a row group begins in its file; the first one at 0."""
    column = metadata.row_group(number).column(0)
    return int(column.dictionary_page_offset or column.data_page_offset) if number else 0


def _arrow(stream: IO[bytes], name: str, config: CorpusConfig) -> Documents:
    # A file has an index of its batches, a stream has not; `datasets` writes streams.
    if head_of(stream).startswith(b"ARROW1"):
        table = pa.ipc.open_file(stream)
        batches: Iterable[Any] = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = table = pa.ipc.open_stream(stream)
    columns = _columns(table.schema.names, name, config)
    yield from _batches((batch.select(columns) for batch in batches), name, config)


def _columns(names: list[str], name: str, config: CorpusConfig) -> list[str]:
    """The columns to read of a table with these names. Raises RecipeError where one is missing."""
    for column in config.content_columns():
        if column not in names:
            raise _no_column(column, names, name, config)
    return [*config.content_columns(), *(column for column in config.optional_columns() if column in names)]


def _batches(batches: Iterable[Any], name: str, config: CorpusConfig) -> Documents:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            where = f"record {number} of {name}"
            yield content(without_nulls(record), where, config), where


READERS: dict[str, Callable[[IO[bytes], str, CorpusConfig], Documents]] = {
    "text": _text,
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": parquet_documents,
    "arrow": _arrow,
}
"""Formats of files; each takes a buffered stream, the file's name for messages, and the settings."""


def without_nulls(value: Any, top: bool = True) -> Any:
    """A record without the nulls in its structs: tables give all structs of a column the same fields."""
    if isinstance(value, dict):
        return {key: without_nulls(part, False) for key, part in value.items() if top or part is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [without_nulls(part, False) for part in value]
    return value


def content(record: Any, where: str, config: CorpusConfig) -> Any:
    """The text of a record, None where it is null, or the record itself where the recipe names messages or token ids.

    Raises RecipeError for a record without the columns that the recipe names, or with something else in them.
    """
    if not isinstance(record, dict):
        raise RecipeError(f"corpus: {where} is {_described(record)}, not an object with columns")
    columns = config.content_columns()
    for column in columns:
        if column not in record:
            raise _no_column(column, list(record), where, config)
    value = record[columns[0]]
    if columns != [config.text_column]:
        if nulls := [column for column in columns if record[column] is None]:
            raise RecipeError(f"corpus: {where} has null in column {nulls[0]!r}: fill it in, or remove the record")
        return record
    if isinstance(value, bytes):  # Parquet files of text may not say that it is
        value = _decoded(value, where, 1)
    if value is not None and not isinstance(value, str):
        key = (
            "ids_column"
            if _is_list_of(value, int)
            else "messages_column"
            if _is_list_of(value, dict)
            else "text_column"
        )
        advice = "name the column with the text by corpus.text_column" if key == "text_column" else f"set corpus.{key}"
        raise RecipeError(f"corpus: {where} has {_described(value)} in column {columns[0]!r}, not text: {advice}")
    return None if value is None else check_characters(value, where)


def _no_column(column: str, columns: list[str], where: str, config: CorpusConfig) -> RecipeError:
    """The error for a missing column, with the key that names it."""
    key = {
        config.messages_column: "messages_column",
        config.ids_column: "ids_column",
        config.mask_column: "mask_column",
    }
    advice = f"set corpus.{key.get(column, 'text_column')}"
    if column == config.text_column and column not in key:
        usual = {
            "messages_column": ("messages", "conversations", "conversation"),
            "ids_column": ("input_ids", "token_ids"),
        }
        there = [f", or corpus.{key} = {name!r}" for key, names in usual.items() for name in names if name in columns]
        advice += "".join(there[:1])
    return RecipeError(f"corpus: {where} has no column {column!r} (columns: {', '.join(columns) or 'none'}): {advice}")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _described(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return f"a list of {_named(value[0])}s" if value else "an empty list"
    return (
        "null" if value is None else f"an {_named(value)}" if isinstance(value, (int, dict)) else f"a {_named(value)}"
    )


def _named(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "list"}
    return names.get(type(value), type(value).__name__)
