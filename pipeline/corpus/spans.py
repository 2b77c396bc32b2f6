"""Ranges of large files, so that several tasks read one file: lines, text between separators, row groups of Parquet.

A document belongs to the range in which it begins. Where that is, both neighbours find by the same rule: the first
separator that begins at the boundary or behind it ends what comes before.
"""

from __future__ import annotations

import io
import math
import re
from typing import IO, Any, NamedTuple

from ..recipe.schema import CorpusConfig
from .formats import READERS, Documents, check_text, head_of, is_json_list, parquet_documents

_LONGEST_END = 2**12
"""Bytes of a separator at most, where a file is cut."""


class Span(NamedTuple):
    """A range of the bytes of a file, up to its end where `last` is None. The documents that begin in it belong to it."""

    first: int
    last: int | None


WHOLE = Span(0, None)


def may_be_cut(form: str, config: CorpusConfig) -> bool:
    """Whether the documents of a span of a file that is not compressed can be found without reading what is before."""
    return form in ("jsonl", "parquet") or (form == "text" and bool(config.document_separator))


def read_span(form: str, stream: IO[bytes], name: str, config: CorpusConfig, span: Span) -> Documents:
    """The documents of a file, an open buffered stream, that begin in a span.

    Raises RecipeError for what cannot be read as its format.
    """
    if span.first == 0 and form in ("text", "jsonl", "csv"):
        check_text(head_of(stream), name)
    if span == WHOLE:
        return READERS[form](stream, name, config)
    if form == "parquet":
        end_of_span = math.inf if span.last is None else span.last
        where = f"{name} behind byte {span.first}" if span.first else name
        return parquet_documents(stream, where, config, lambda place: span.first <= place < end_of_span)
    if form == "jsonl" and is_json_list(head_of(stream)):  # it is read from end to end, with the first span
        return READERS[form](stream, name, config) if span.first == 0 else iter(())
    separator = (config.document_separator or "\n") if form == "text" else "\n"
    end = re.compile(re.escape(separator).encode().replace(b"\\\n", rb"\r?\n"))  # a line may end in two ways
    first = _behind(stream, end, span.first)
    last = None if span.last is None else _behind(stream, end, span.last)
    where = f"{name} behind byte {first}" if first else name
    return READERS[form](_part_of(stream, first, last), where, config)


def _behind(stream: IO[bytes], end: re.Pattern[bytes], place: int) -> int:
    """Where the first document begins behind a place: behind the first `end` that begins there or later."""
    if place == 0:
        return 0
    stream.seek(place)
    data, size, before = b"", 2**16, place
    while more := stream.read(size):
        data += more
        if (found := end.search(data)) is not None:
            return before + found.end()
        kept = min(len(data), _LONGEST_END)
        before, data, size = before + len(data) - kept, data[-kept:], 2**22
    return before + len(data)


def _part_of(stream: IO[bytes], first: int, last: int | None) -> IO[bytes]:
    """The bytes of a stream from `first` up to `last`, buffered."""
    stream.seek(first)
    return io.BufferedReader(_Range(stream, last), 2**16)


class _Range(io.RawIOBase):
    """What a stream has from where it is up to a place."""

    def __init__(self, stream: IO[bytes], last: int | None) -> None:
        self._stream, self._left = stream, math.inf if last is None else max(last - stream.tell(), 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(int(min(len(buffer), self._left)))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)
