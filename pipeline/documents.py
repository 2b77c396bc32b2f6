"""What a corpus is made of: documents, from files or a hub, and the token ids that they become.

A document is text, a conversation (rendered by the tokenizer's own chat template), or ready token ids. The latter two may
say which tokens are to be learned. Files are read through fsspec: directories, patterns, archives, URLs, compressed or not.
"""

from __future__ import annotations

import errno
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from pipeline.config import CorpusConfig
from pipeline.errors import RecipeError
from pipeline.rows import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """One document as the source gives it; `key` is what decides on which side it lands, `where` names it in errors."""

    key: str
    where: str
    messages: list[dict[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    loss_mask: Sequence[int] | None = None


def read_documents(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """The non-empty documents of a corpus, in order."""
    for value, where in _raw_documents(config):
        if isinstance(value, str):
            if value.strip():
                yield Document(value, where)
        elif config.messages_column is not None:
            yield _conversation(value[config.messages_column], where, config, tokenizer)
        else:
            yield _ready_tokens(value, where, config, len(tokenizer))


def _conversation(messages: Any, where: str, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Document:
    valid = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not valid or not messages:
        raise RecipeError(
            f"corpus: {where} has no conversation in column {config.messages_column!r}: it must be a list of "
            "{role, content}"
        )
    if not tokenizer.chat_template:
        raise RecipeError("corpus.messages_column: the teacher's tokenizer has no chat template")
    text = _whole_characters(_apply_template(tokenizer, messages, where, tokenize=False), where)
    if config.loss_on == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Document(text, where, token_ids=ids)
    return Document(text, where, messages=messages)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:
        raise RecipeError(
            f"corpus: {where}: the tokenizer's chat template refuses the conversation ({error}): change it, or the template"
        ) from error


def _whole_characters(text: str, where: str) -> str:
    """The text. Raises RecipeError where it holds half of a surrogate pair, as JSON does where an emoji was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"corpus: {where} holds half of a character ({text[error.start]!a}), which no tokenizer can read: take it out"
        ) from error
    return text


def _ready_tokens(record: dict[str, Any], where: str, config: CorpusConfig, vocab_size: int) -> Document:
    assert config.ids_column is not None
    ids = record[config.ids_column]
    whole = isinstance(ids, list) and set(map(type, ids)) == {int}
    if not whole or min(ids) < 0 or max(ids) >= vocab_size:
        raise RecipeError(
            f"corpus: {where} has no token ids of this tokenizer (0 to {vocab_size - 1}) in column {config.ids_column!r}"
        )
    mask = record[config.mask_column] if config.mask_column is not None else None
    if mask is not None and not (isinstance(mask, list) and all(entry in (0, 1) for entry in mask)):
        raise RecipeError(f"corpus: {where} has no list of 0 and 1 in column {config.mask_column!r}")
    if mask is not None and len(mask) != len(ids):
        raise RecipeError(
            f"corpus: {where}: {config.mask_column!r} has {len(mask)} entries and {config.ids_column!r} {len(ids)}"
        )
    return Document(json.dumps(ids), where, token_ids=ids, loss_mask=mask)


def encode(
    tokenizer: PreTrainedTokenizerBase, document: Document, prefix: list[int], suffix: list[int]
) -> tuple[IntArray, IntArray | None]:
    """Token ids [n] and, where the document says what is to be learned, loss mask [n]."""
    if document.token_ids is not None:
        ids, mask = document.token_ids, document.loss_mask
    elif document.messages is not None:
        ids, mask = encode_chat(tokenizer, document.messages, document.where)
    else:
        # verbose=False: a document longer than the model's positions is no mistake here, it is cut into rows.
        options: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        ids, mask = [*prefix, *tokenizer(document.key, **options)["input_ids"], *suffix], None
    return np.asarray(ids, np.int32), None if mask is None else np.asarray(mask, np.int32)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str = "a conversation"
) -> tuple[list[int], list[int]]:
    """A conversation through the tokenizer's chat template -> token ids [n], and 1 where the assistant speaks [n].

    Templates that mark the assistant's words with {% generation %} are asked themselves. For others, a reply is what the
    template adds to the conversation before it (with the prompt for a reply) once the reply is there, to the last token
    that is not white space. Raises RecipeError where a template refuses the conversation, or rewrites earlier turns, so
    that neither is known.
    """
    template = tokenizer.get_chat_template()
    if "generation %}" in template or "generation -%}" in template:
        marked = _apply_template(
            tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(marked["input_ids"]), list(marked["assistant_masks"])

    def rendered(turns: int, prompt: bool = False) -> str:
        text: str = _apply_template(tokenizer, messages[:turns], where, tokenize=False, add_generation_prompt=prompt)
        return text

    text = rendered(len(messages))
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = rendered(turn + 1)
        before: str | None
        if turn > 0:
            before = rendered(turn, prompt=True)
        else:
            # No template takes an empty conversation. The prompt for a reply is the same before this one as after it.
            prompt = rendered(1, prompt=True).removeprefix(after)
            before = after[: after.index(prompt) + len(prompt)] if prompt in after else None
        after = after.rstrip()
        if before is None or not text.startswith(before) or not text.startswith(after):
            raise RecipeError(
                f"corpus: {where}: the tokenizer's chat template changes earlier turns when a new one is added: mark the "
                "assistant's words in it with {% generation %}, or set corpus.loss_on = 'all'"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [int(any(begin < stop and end > start for start, stop in spans)) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after every document: what the tokenizer itself puts first, and its end of sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    prefix = framed[: framed.index(bare[0])] if bare and bare[0] in framed else []
    if tokenizer.eos_token_id is None:
        raise RecipeError("the teacher's tokenizer has no end-of-sequence token to separate documents with")
    return list(prefix), [int(tokenizer.eos_token_id)]


def texts(config: CorpusConfig) -> Iterator[str]:
    """The documents of a corpus as text. Raises RecipeError where it holds conversations or token ids."""
    if config.content_columns() != [config.text_column]:
        raise RecipeError("corpus: only plain text can be read as such, not messages_column or ids_column")
    for text, _ in _raw_documents(config):
        yield text


def _raw_documents(config: CorpusConfig) -> Iterator[tuple[Any, str]]:
    """Text, or a record with the columns that the recipe names, and where it stands."""
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
    """The text of a record, or the record itself where the recipe reads conversations or token ids."""
    columns = config.content_columns()
    value = record.get(columns[0])
    if columns == [config.text_column]:
        if not isinstance(value, str):
            raise RecipeError(
                f"corpus: {where} has no text in column {config.text_column!r} (columns: {', '.join(record) or 'none'}): "
                "set corpus.text_column"
            )
        return _whole_characters(value, where)
    missing = [name for name in columns if record.get(name) is None]
    if missing:
        raise RecipeError(f"corpus: {where} has no column {missing[0]!r} (columns: {', '.join(record) or 'none'})")
    return record


_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst")
_TARS = {".tgz": "gzip", ".tbz": "bz2", ".tbz2": "bz2", ".txz": "xz"}
"""Endings that stand for .tar and one of compression."""
_BAD_ARCHIVES = (tarfile.TarError, zipfile.BadZipFile)


def _plain(name: str) -> str:
    """A file's name in small letters, without the ending of compression."""
    name = name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name


def _kind(name: str) -> str:
    """What a file holds, by its name."""
    ending = _plain(name).rpartition(".")[2]
    return {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "parquet": "parquet"}.get(ending, "text")


def _archive(name: str) -> str | None:
    """How fsspec calls the kind of archive that a file is, by its name; None for other files."""
    plain = _plain(name)
    return "zip" if plain.endswith(".zip") else "tar" if plain.endswith((".tar", *_TARS)) else None


class _SourceFile(NamedTuple):
    """A file on any file system that fsspec knows."""

    system: Any
    name: str

    def open(self) -> IO[bytes]:
        if self.name.lower().endswith(".zst"):
            # fsspec needs another package for it.
            packed = pa.CompressedInputStream(self.system.open(self.name, "rb"), "zstd")
            return io.BufferedReader(packed)
        stream: IO[bytes] = self.system.open(self.name, "rb", compression="infer")
        return stream


def _source_files(config: CorpusConfig) -> list[_SourceFile]:
    """The files behind the sources, sorted within each. A directory stands for all files under it."""
    from fsspec.core import url_to_fs

    found: list[_SourceFile] = []
    for source in [config.source] if isinstance(config.source, str) else config.source:
        try:
            packed = next((kind for ending, kind in _TARS.items() if source.lower().endswith(ending)), None)
            # Only where the ending is .tar and another one does fsspec see that by itself.
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
                    f"corpus.source: {archive} is an archive: name the files in it, all of them by '{kind}://**::{archive}'"
                )
        found += [_SourceFile(system, str(name)) for name in sorted(names)]
    return found


def source_stamp(config: CorpusConfig) -> list[Any]:
    """Names and sizes of the source files, so that changed text is noticed."""
    if config.format == "hub":
        return [config.source, config.hub_config, config.hub_split]
    stamp = []
    for file in _source_files(config):
        try:
            stamp.append([file.name, file.system.size(file.name)])
        except FileNotFoundError as error:
            raise RecipeError(f"corpus.source: {file.name} leads to no file: mend the link, or remove it") from error
    return stamp


def shown_source(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)
