"""The parts of a corpus, files and data sets of the hub: their documents, and which bytes they hold."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import lzma
import os.path
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import pyarrow as pa
from fsspec.utils import infer_compression

from ..base.errors import PipelineError, RecipeError, first_line
from ..recipe.schema import CorpusConfig
from .formats import Documents, content, without_nulls
from .spans import WHOLE, Span, may_be_cut, read_span

logger = logging.getLogger(__name__)

BAD_ARCHIVES = (tarfile.TarError, zipfile.BadZipFile)
_STATED = ("sha256", "md5Hash", "md5", "Content-MD5", "crc32c", "CRC", "ETag", "etag", "blob_id")
"""What file systems tell of a file that depends on its content."""
_WRITTEN = ("mtime", "created", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "date_time")
"""What file systems tell of a file that changes when it is written."""


class Version(NamedTuple):
    """What is known of a part without reading it."""

    size: int | None
    stated: str | None
    """What depends on its content, as its file system states it; None where it states nothing."""
    written: list[str]
    """What changes when it is written, such as its time of modification."""


class SourceFile(NamedTuple):
    """A file on any file system that fsspec knows."""

    system: Any
    name: str
    format: str
    info: Mapping[str, Any]
    """What its file system tells of it."""
    archive: str = ""
    """URL of the archive that it lies in."""

    def open(self) -> IO[bytes]:
        """A buffered stream of its bytes, unpacked where the name says that they are compressed."""
        if self.name.lower().endswith(".zst"):
            # fsspec needs another package for zstd, pyarrow has it.
            return io.BufferedReader(pa.CompressedInputStream(self.system.open(self.name, "rb"), "zstd"))
        return io.BufferedReader(self.system.open(self.name, "rb", compression="infer"), 2**16)

    @property
    def is_remote(self) -> bool:
        """Whether it comes over a network."""
        return "file" not in self.system.protocol

    def spans(self, config: CorpusConfig, size: int) -> list[Span]:
        """Ranges of bytes, of about `size` each, whose documents can be read apart; the whole file where it has no such.

        They follow from what is known of the file without reading it.
        """
        known = self.info.get("size")
        if (
            known is None
            or self.archive
            or infer_compression(self.name) is not None
            or {"http", "https"} & {self.system.protocol, *self.system.protocol}
            or not may_be_cut(self.format, config)
        ):
            return [WHOLE]
        count = max(round(known / size), 1)
        places = [known * number // count for number in range(count)]
        return [Span(first, last) for first, last in zip(places, [*places[1:], None], strict=True)]

    def documents(self, config: CorpusConfig, span: Span = WHOLE) -> Documents:
        """Its documents, those that begin in a span.

        Raises RecipeError, naming the file, where it cannot be read as its format.
        """
        try:
            with self.open() as stream:
                yield from read_span(self.format, stream, self.name, config, span)
        except PermissionError as error:
            raise RecipeError(
                f"corpus.source: {self.name}: permission denied: make it readable to this user"
            ) from error
        except PipelineError:
            raise
        except Exception as error:  # of client libraries, each raises its own classes
            damaged = (OSError, EOFError, zlib.error, lzma.LZMAError, *BAD_ARCHIVES, pa.ArrowException)
            disk = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
            if disk or not (isinstance(error, damaged) or self.is_remote):
                raise
            what = " ".join(str(error).split()) or type(error).__name__
            problem = "it is empty" if self.info.get("size") == 0 else f"is it damaged? ({what})"
            raise RecipeError(f"{self.name}: cannot be read as {self.format}, {problem}") from error

    def version(self) -> Version:
        """Its version when it was found, with that of the archive that it lies in."""
        from fsspec.core import url_to_fs

        own = _version(self.system, self.info)
        if not self.archive or own.stated is not None:
            return own
        system, path = url_to_fs(self.archive)
        whole = _version(system, system.info(path))
        return own._replace(written=[*own.written, str(whole.size), str(whole.stated), *whole.written])

    def digest(self) -> str:
        """sha256 of its bytes. Raises RecipeError where it is not the file any more that was found."""
        with self.system.open(self.name, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self.check_unchanged()
        return digest

    def check_unchanged(self) -> None:
        """Raises RecipeError where it is not the file any more that was found."""
        if self._replace(info=self.system.info(self.name)).version() != self.version():
            raise RecipeError(f"corpus.source: {self.name} was changed while it was read: run `prepare` again")


class HubDataSet(NamedTuple):
    """A split of a data set of the hub."""

    name: str
    config: str | None
    split: str
    revision: str | None

    def spans(self, config: CorpusConfig, size: int) -> list[Span]:
        """One for each of its files. Raises RecipeError where it cannot be loaded."""
        try:
            count = getattr(self._stream(), "num_shards", 1)
        except Exception as error:  # as above
            raise RecipeError(f"corpus.source: data set {self.name!r} cannot be loaded: {first_line(error)}") from error
        return [Span(number, number + 1) for number in range(count)] if count > 1 else [WHOLE]

    def _stream(self) -> Any:
        import datasets

        return datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)

    def documents(self, config: CorpusConfig, span: Span = WHOLE) -> Documents:
        """Its documents, or those of the file that a span numbers. Raises RecipeError where it cannot be loaded."""
        number = 0
        try:
            data = self._stream()
            if span != WHOLE:
                data = data.shard(num_shards=data.num_shards, index=span.first)
            of_file = "" if span == WHOLE else f" of file {span.first + 1}"
            for record in data:
                number += 1
                where = f"record {number}{of_file} of {self.name}"
                yield content(without_nulls(record), where, config), where
        except PipelineError:
            raise
        except Exception as error:  # as above
            behind = f"read behind record {number}" if number else "loaded"
            raise RecipeError(
                f"corpus.source: data set {self.name!r} cannot be {behind}: {first_line(error)}"
            ) from error

    def version(self) -> Version:
        """The commit that its name means now, unknown where the hub does not answer."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        except Exception:  # as above
            return Version(None, None, [])
        return Version(None, f"{builder.config_id} {builder.hash}", [])

    def digest(self) -> str:
        """Nothing is read for it."""
        return "unknown"

    def check_unchanged(self) -> None:
        """Its revision says what it is."""


Part = SourceFile | HubDataSet


class PartSpan(NamedTuple):
    """A span of the part with this number."""

    part: int
    span: Span = WHOLE


@dataclass
class Sources:
    """The parts of a corpus, in the order in which they are read."""

    parts: Sequence[Part]
    notes: Sequence[str] = ()
    """Lines for people: what of a directory is not read, and which patterns mean several formats."""
    spans: Sequence[PartSpan] | None = None
    """What is read; None: all of it."""
    begun: int = 0
    """Number of parts that were read, the last one perhaps in part."""
    whole: bool = False
    """Whether all that is to be read was read to its end."""
    _digests: dict[str, str] = field(default_factory=dict)

    def digest(self, part: Part) -> str:
        """That of a part, which is read once."""
        if part.name not in self._digests:
            self._digests[part.name] = part.digest()
        return self._digests[part.name]

    def documents(self, config: CorpusConfig) -> Documents:
        """Each document, as text or as a record with the columns that the recipe names, and its place in the source."""
        told = False
        spans = [PartSpan(number) for number in range(len(self.parts))] if self.spans is None else self.spans
        for number, span in spans:
            self.begun = max(self.begun, number + 1)
            for value, where in self.parts[number].documents(config, span):
                if value is None and not told:
                    logger.info(
                        f"corpus: {where} has null in column {config.text_column!r}: such records are passed over"
                    )
                    told = True
                yield "" if value is None else value, where
        self.whole = True


def _version(system: Any, info: Mapping[str, Any]) -> Version:
    """The version of a file by what its file system tells of it."""
    if info.get("islink"):
        info = system.info(os.path.realpath(info["name"]))  # of what it leads to
    known = {**info, **(info.get("lfs") or {})}
    stated = next((f"{key} {known[key]}" for key in _STATED if known.get(key) is not None), None)
    return Version(info.get("size"), stated, [f"{key} {known[key]}" for key in _WRITTEN if known.get(key) is not None])
