"""From text to packed rows: documents -> tokens -> rows of equal length, written as Arrow.

Documents are joined end to end, each closed by the tokenizer's end-of-sequence token, and cut into rows. `segment_ids`
number the documents inside a row, so that attention and positions can restart at their boundaries. Whole documents are
held out, chosen by a hash of their text: copies of one document land on the same side.

A document is text, a conversation (rendered by the tokenizer's own chat template), or ready token ids. The latter two may
say which tokens are to be learned: the rows then have a third column, `loss_mask`. Rows for masked models are made by
`masking` and have `labels` instead.

On disk a corpus is a directory that `datasets.load_from_disk` opens. `prepared.json` in it holds size and checksum of every
other file, and `rows.crc32c` the crc32c of every row, which is checked whenever a row is read.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CorpusConfig, Recipe
from pipeline.durable import (
    TEMPORARY,
    aside_of,
    bytes_digest,
    file_digest,
    json_digest,
    local_copy,
    parse_json,
    publish_directory,
    read_json,
)
from pipeline.errors import CorruptError, IncompleteError, MismatchError, RecipeError
from pipeline.masking import PADDING, Framer, Masking, mask_rows
from pipeline.progress import say
from pipeline.storage import Place, files_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
_ROWS_PER_BATCH = 1024
_META = "prepared.json"
_DATA = "data-00000-of-00001.arrow"
_CHECKSUMS = "rows.crc32c"  # little-endian uint32 of each row
_REMEDY = "delete the corpus directory and run `prepare` again, which makes the same one of the same text"
TOKENIZER = "tokenizer"  # what made the rows, kept beside them

IntArray = np.ndarray[Any, np.dtype[np.int32]]


class PackedRows:
    """The rows of one corpus directory, memory-mapped; those of a remote one in a local copy."""

    def __init__(self, path: Place) -> None:
        """Raises IncompleteError where nothing was prepared, CorruptError for files that are not as `prepare` left them."""
        self.path = path
        try:
            self.local = local_copy(path, _META, lambda copy: _check_files(copy, shown=path))
            meta = (self.local / _META).read_bytes()
            self.stamp = bytes_digest(meta)
            """Digest of what was prepared, every file included."""
            self.meta = _check_files(self.local, shown=path, skip=_DATA)
            with pa.memory_map(str(self.local / _DATA)) as source:
                table = pa.ipc.open_stream(source).read_all()
            self.rows: int = table.num_rows
            self.row_length: int = self.meta["row_length"]
            self.masked = _MASK in table.column_names
            """Whether a loss mask says what is to be learned."""
            self.objective = "masked" if _LABELS in table.column_names else "causal"
            """What the labels are: the next token, or the one that a mask hides."""
            third = [name for name in (_MASK, _LABELS) if name in table.column_names]
            self._columns = {
                name: [chunk.flatten().to_numpy().reshape(-1, self.row_length) for chunk in table[name].chunks]
                for name in ("input_ids", "segment_ids", *third)
            }
            sizes = {name: [len(chunk) for chunk in chunks] for name, chunks in self._columns.items()}
            self._checksums = np.fromfile(self.local / _CHECKSUMS, "<u4")
        except FileNotFoundError as error:
            raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path}: the corpus cannot be read ({error}): {_REMEDY}") from error
        whole = [_ROWS_PER_BATCH] * (self.rows // _ROWS_PER_BATCH)
        expected = [*whole, *([self.rows % _ROWS_PER_BATCH] if self.rows % _ROWS_PER_BATCH else [])]
        if (
            self.rows != self.meta["rows"]
            or len(self._checksums) != self.rows
            or any([size for size in found if size] != expected for found in sizes.values())
        ):
            raise CorruptError(f"{path}: {self.rows} rows where {self.meta['rows']} were prepared: {_REMEDY}")

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[IntArray, IntArray]:
        """input_ids and segment_ids, both [len(rows), row_length] int32. Raises CorruptError for a damaged row."""
        columns = self._take(rows)
        return columns["input_ids"], columns["segment_ids"]

    def labels(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[len(rows), row_length]: what is to be predicted at each position, -100 where that is nothing.

        The next token of the same document, unless a loss mask leaves it out; in masked rows the token itself, where chosen.
        """
        return self._labels(self._take(rows))

    def examples(
        self, rows: np.ndarray[Any, np.dtype[np.int64]]
    ) -> tuple[IntArray, IntArray, np.ndarray[Any, np.dtype[np.int64]]]:
        """What `take` and `labels` give, read once."""
        columns = self._take(rows)
        return columns["input_ids"], columns["segment_ids"], self._labels(columns)

    def _labels(self, columns: dict[str, IntArray]) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self.objective == "masked":
            return columns[_LABELS].astype(np.int64)
        return next_token_labels(columns["input_ids"], columns["segment_ids"], columns.get(_MASK))

    def _take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, IntArray]:
        # The columns of a row side by side, as the checksum goes over them.
        taken = np.empty((len(rows), len(self._columns), self.row_length), "<i4")
        checksums = self._checksums[rows].tolist()
        for slot, row in enumerate(rows.tolist()):
            chunk, place = divmod(row, _ROWS_PER_BATCH)
            for column, chunks in enumerate(self._columns.values()):
                taken[slot, column] = chunks[chunk][place]
            if _row_checksum(taken[slot]) != checksums[slot]:
                raise CorruptError(f"{self.path}: row {row} is not as it was prepared: {_REMEDY}")
        return dict(zip(self._columns, taken.swapaxes(0, 1), strict=True))

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """sha256 of the rows' tokens and boundaries, and of the loss mask or labels where there are any."""
        sha = hashlib.sha256()
        for first in range(start, self.rows if stop is None else stop, _ROWS_PER_BATCH):
            rows = np.arange(first, min(first + _ROWS_PER_BATCH, self.rows if stop is None else stop))
            for part in self._take(rows).values():
                sha.update(np.ascontiguousarray(part, "<i4").tobytes())
        return sha.hexdigest()


def _row_checksum(columns_CL: IntArray) -> int:
    """crc32c of one row: its columns [C, L], one after the other."""
    return int(google_crc32c.value(np.ascontiguousarray(columns_CL, "<i4").tobytes()))


def _check_files(folder: Place, *, shown: Place, skip: str | None = None) -> dict[str, Any]:
    """Compare a corpus with its own `prepared.json`, all but the file `skip`, and return what that says.

    `shown` is what errors call it.

    Raises FileNotFoundError where nothing was prepared, CorruptError naming a file that is not as `prepare` left it.
    """
    meta: dict[str, Any] = parse_json((folder / _META).read_bytes(), shown / _META, _REMEDY)
    try:
        expected = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in meta["files"].items()}
        whole = {_DATA, _CHECKSUMS} <= set(expected) and isinstance(meta["rows"], int) and meta["row_length"] > 0
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{shown / _META}: not what `prepare` writes ({error!r}): {_REMEDY}") from error
    sizes = files_in(folder)  # others may lie there too: `datasets` keeps what it computes beside its files
    missing = sorted(set(expected) - set(sizes))
    if not whole or missing:
        raise CorruptError(f"{shown}: files are missing ({', '.join(missing) or 'the rows'}): {_REMEDY}")
    for name, (size, digest) in expected.items():
        if sizes[name] != size or (name != skip and file_digest(folder / name) != digest):
            raise CorruptError(f"{shown / name}: not as it was prepared: {_REMEDY}")
    return meta


def verify_corpus(path: Place) -> None:
    """Check every byte of a corpus. Raises IncompleteError where there is none, CorruptError naming what is damaged."""
    try:
        _check_files(path, shown=path)
    except FileNotFoundError as error:
        raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error


def next_token_labels(
    input_ids: IntArray, segment_ids: IntArray, loss_mask: IntArray | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """labels[..., t] = the token after t in the same document, -100 at row ends and document ends.

    With `loss_mask`, also -100 where that next token is not one to be learned (0).
    """
    labels = np.full(input_ids.shape, IGNORE, np.int64)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    if loss_mask is not None:
        same &= loss_mask[..., 1:] != 0
    labels[..., :-1] = np.where(same, input_ids[..., 1:], IGNORE)
    return labels


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, normalisation, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        # Truncation and padding are settings of a call, not of the tokenizer.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:
        definition = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"definition": definition, "specials": specials})


def prepare_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
    """Write the training and held-out rows of a recipe, or find them done.

    Raises RecipeError for text that is missing, empty or not UTF-8, and for rows longer than the teacher's positions;
    MismatchError if other rows are already there and a cache was built on them.
    """
    config = recipe.corpus
    if max_positions is not None and config.row_length > max_positions:
        raise RecipeError(
            f"corpus.row_length = {config.row_length} is beyond the teacher's {max_positions} positions: choose at most that"
        )
    settings = {
        "corpus": config.model_dump(),
        "sources": _source_stamp(config),
        "seed": recipe.seed,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    sides = {"train": recipe.cache_dir / "corpus", "heldout": recipe.heldout_dir / "corpus"}
    if all(_already_prepared(path, settings) for path in sides.values()):
        for side, path in sides.items():
            rows = PackedRows(path)
            say(f"prepare: {path} is done, {rows.rows:,} {side} rows of {rows.row_length} tokens")
        return

    masking = Masking.of(tokenizer, config, recipe.seed) if config.objective == "masked" else None
    prefix, suffix = _document_frame(tokenizer) if masking is None else ([], [])
    limits = {"train": config.max_rows, "heldout": config.max_heldout_rows}
    masked = config.mask_column is not None or (config.messages_column is not None and config.loss_on == "assistant")
    writers = {side: RowWriter(path, config.row_length, limits[side], masked, masking) for side, path in sides.items()}
    documents = 0
    try:
        lowest: tuple[float, str] | None = None
        for document in _documents(config, tokenizer):
            documents += 1
            draw = _heldout_draw(document.key, recipe.seed)
            if lowest is None or draw < lowest[0]:
                lowest = (draw, document.key)
            side = "heldout" if draw < config.heldout_fraction else "train"
            if not writers[side].full:
                writers[side].add(*_encode(tokenizer, document, prefix, suffix))
            if all(writer.full for writer in writers.values()):
                break
        if documents == 0:
            raise RecipeError(f"corpus.source: no text in {_shown(config.source)}: every document is empty")
        if config.heldout_fraction > 0 and writers["heldout"].documents == 0:
            # A small corpus may draw nothing: then the document nearest to being drawn is held out.
            if documents < 2:
                raise RecipeError(
                    "corpus.source has one document, and held-out rows are split off by document: give several files, "
                    "set corpus.document_separator to cut it, or set corpus.heldout_fraction = 0"
                )
            assert lowest is not None
            for writer in writers.values():
                writer.restart()
            for document in _documents(config, tokenizer):
                side = "heldout" if document.key == lowest[1] else "train"
                if not writers[side].full:
                    writers[side].add(*_encode(tokenizer, document, prefix, suffix))
        for side, writer in writers.items():
            needed = side == "train" or config.heldout_fraction > 0
            if needed and writer.rows == 0:
                raise RecipeError(
                    f"corpus: the {writer.documents} {side} documents hold {writer.tokens:,} tokens, less than one row of "
                    f"{config.row_length}: give more text or a smaller corpus.row_length"
                )
        for side, writer in writers.items():
            tokenizer.save_pretrained(writer.aside / TOKENIZER)
            writer.commit(settings)
            say(
                f"prepare: {writer.path}: {writer.committed_rows:,} {side} rows of {config.row_length} tokens from "
                f"{writer.documents:,} documents ({writer.dropped:,} tokens left over)"
            )
    finally:
        for writer in writers.values():
            writer.discard()


def _heldout_draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the document alone."""
    digest = hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after every document: what the tokenizer itself puts first, and its end of sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    prefix = framed[: framed.index(bare[0])] if bare and bare[0] in framed else []
    if tokenizer.eos_token_id is None:
        raise RecipeError("the teacher's tokenizer has no end-of-sequence token to separate documents with")
    return list(prefix), [int(tokenizer.eos_token_id)]


@dataclass(frozen=True)
class _Document:
    """One document as the source gives it; `key` is what decides on which side it lands."""

    key: str
    messages: list[dict[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    loss_mask: Sequence[int] | None = None


def _encode(
    tokenizer: PreTrainedTokenizerBase, document: _Document, prefix: list[int], suffix: list[int]
) -> tuple[IntArray, IntArray | None]:
    """Token ids [n] and, where the document says what is to be learned, loss mask [n]."""
    if document.token_ids is not None:
        ids, mask = document.token_ids, document.loss_mask
    elif document.messages is not None:
        ids, mask = encode_chat(tokenizer, document.messages)
    else:
        # verbose=False: a document longer than the model's positions is no mistake here, it is cut into rows.
        options: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        ids, mask = [*prefix, *tokenizer(document.key, **options)["input_ids"], *suffix], None
    return np.asarray(ids, np.int32), None if mask is None else np.asarray(mask, np.int32)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """A conversation through the tokenizer's chat template -> token ids [n], and 1 where the assistant speaks [n].

    Templates that mark the assistant's words with {% generation %} are asked themselves. For others, a reply is what the
    template adds to the conversation before it (with the prompt for a reply) once the reply is there, to the last token
    that is not white space. Raises RecipeError where a template rewrites earlier turns, so that neither is known.
    """
    template = tokenizer.get_chat_template()
    if "generation %}" in template or "generation -%}" in template:
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(marked["input_ids"]), list(marked["assistant_masks"])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False).rstrip()
        if not text.startswith(before) or not text.startswith(after):
            raise RecipeError(
                "the tokenizer's chat template changes earlier turns when a new one is added: mark the assistant's words in "
                "it with {% generation %}, or set corpus.loss_on = 'all'"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [int(any(begin < stop and end > start for start, stop in spans)) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def _documents(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Document]:
    """The non-empty documents of a corpus, in order."""
    for value, where in _raw_documents(config):
        if isinstance(value, str):
            if value.strip():
                yield _Document(value)
        elif config.messages_column is not None:
            yield _conversation(value[config.messages_column], where, config, tokenizer)
        else:
            yield _ready_tokens(value, where, config, len(tokenizer))


def _conversation(messages: Any, where: str, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> _Document:
    valid = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not valid or not messages:
        raise RecipeError(
            f"corpus: {where} has no conversation in column {config.messages_column!r}: it must be a list of "
            "{role, content}"
        )
    if not tokenizer.chat_template:
        raise RecipeError("corpus.messages_column: the teacher's tokenizer has no chat template")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if config.loss_on == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return _Document(text, token_ids=ids)
    return _Document(text, messages=messages)


def _ready_tokens(record: dict[str, Any], where: str, config: CorpusConfig, vocab_size: int) -> _Document:
    assert config.ids_column is not None
    ids = record[config.ids_column]
    if not isinstance(ids, list) or not ids or min(ids) < 0 or max(ids) >= vocab_size:
        raise RecipeError(
            f"corpus: {where} has no token ids of this tokenizer (0 to {vocab_size - 1}) in column {config.ids_column!r}"
        )
    mask = record[config.mask_column] if config.mask_column is not None else None
    if mask is not None and len(mask) != len(ids):
        raise RecipeError(
            f"corpus: {where}: {config.mask_column!r} has {len(mask)} entries and {config.ids_column!r} {len(ids)}"
        )
    return _Document(json.dumps(ids), token_ids=ids, loss_mask=mask)


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
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowInvalid) as error:
            if isinstance(error, OSError) and error.errno is not None:
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
        return value
    missing = [name for name in columns if record.get(name) is None]
    if missing:
        raise RecipeError(f"corpus: {where} has no column {missing[0]!r} (columns: {', '.join(record) or 'none'})")
    return record


def _kind(name: str) -> str:
    """What a file holds, by its name without the endings of compression."""
    for packed in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        name = name.removesuffix(packed)
    return {"jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}.get(name.rpartition(".")[2], "text")


class _SourceFile(NamedTuple):
    """A file on any file system that fsspec knows."""

    system: Any
    name: str

    def open(self) -> IO[bytes]:
        stream: IO[bytes] = self.system.open(self.name, "rb", compression="infer")
        return stream


def _source_files(config: CorpusConfig) -> list[_SourceFile]:
    """The files behind the sources, sorted within each. A directory stands for all files under it."""
    from fsspec.core import url_to_fs

    found: list[_SourceFile] = []
    for source in [config.source] if isinstance(config.source, str) else config.source:
        try:
            system, path = url_to_fs(source)
            if system.isdir(path):
                names = system.find(path)
            elif any(sign in path for sign in "*?["):
                names = [name for name in system.glob(path) if not system.isdir(name)]
            else:
                names = [path] if system.exists(path) else []
        except PermissionError:
            raise
        except (OSError, ValueError, ImportError, tarfile.TarError) as error:
            raise RecipeError(f"corpus.source: cannot open {source!r} ({error})") from error
        if not names:
            raise RecipeError(f"corpus.source: no file matches {source!r}")
        found += [_SourceFile(system, str(name)) for name in sorted(names)]
    return found


def _source_stamp(config: CorpusConfig) -> list[Any]:
    """Names and sizes of the source files, so that changed text is noticed."""
    if config.format == "hub":
        return [config.source, config.hub_config, config.hub_split]
    return [[file.name, file.system.size(file.name)] for file in _source_files(config)]


def _shown(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _already_prepared(path: Place, settings: dict[str, Any]) -> bool:
    meta = read_json(path / _META, f"delete {path} and run `prepare`")
    if meta is None:
        return False
    if meta["settings"] == settings:
        return True
    if (path.parent / "manifest.json").exists():
        changed = [key for key in settings if meta["settings"].get(key) != settings[key]]
        if "corpus" in changed:
            old, new = meta["settings"]["corpus"], settings["corpus"]
            changed += [f"corpus.{k} ({old.get(k)!r} -> {new[k]!r})" for k in new if old.get(k) != new[k]]
            changed.remove("corpus")
        raise MismatchError(
            f"{path} was prepared with other settings and a cache is built on it: {', '.join(changed)} differ: "
            "choose another run_dir, or delete that one"
        )
    return False


class RowWriter:
    """Packs tokens into rows and streams them to an Arrow file beside the final place."""

    def __init__(
        self,
        path: Place,
        row_length: int,
        limit: int | None = None,
        masked: bool = False,
        masking: Masking | None = None,
    ) -> None:
        """`masked` rows carry a loss mask; with `masking`, documents are framed and tokens hidden."""
        self.path, self._row_length, self._limit = path, row_length, limit
        self._masking = masking
        self._third = _LABELS if masking is not None else _MASK if masked else None
        # One name for all processes: what a killed one left is cleared away by the next.
        self.aside = path.with_name(path.name + TEMPORARY) if isinstance(path, Path) else aside_of(path)
        self._writer: Any = None
        self.committed_rows = 0
        self.restart()

    def restart(self) -> None:
        self.discard()
        self.aside.mkdir(parents=True)
        self._schema = _features(self._row_length, self._third)
        self._writer = pa.ipc.new_stream(str(self.aside / _DATA), self._schema)
        self._tokens = [np.empty(0, np.int32)]
        self._segments = [np.empty(0, np.int32)]
        self._masks = [np.empty(0, np.int32)]
        self._framer = Framer(self._row_length, self._masking) if self._masking is not None else None
        self._held = 0
        self._written = 0
        self._sha = hashlib.sha256()
        self._checksums: list[int] = []
        self.documents = self.tokens = 0

    @property
    def rows(self) -> int:
        return self._written + self._held // self._row_length

    @property
    def full(self) -> bool:
        return self._limit is not None and self.rows >= self._limit

    def add(self, tokens: IntArray, loss_mask: IntArray | None = None) -> None:
        """One document, joined to the one before. Without a mask all of its tokens are to be learned."""
        if self.full:
            return
        self.documents += 1
        self.tokens += len(tokens)
        loss_mask = np.ones(len(tokens), np.int32) if loss_mask is None else loss_mask
        if self._framer is None:
            self._append(tokens, np.full(len(tokens), self.documents, np.int32), loss_mask)
            return
        assert self._masking is not None
        for row, segments in self._framer.add(tokens):
            for _ in range(self._masking.draws):
                self._append(row, segments, np.ones(len(row), np.int32))

    def _append(self, *columns: IntArray) -> None:
        """Tokens, segments and loss mask [n], up to the limit of rows."""
        if self._limit is not None:
            room = (self._limit - self._written) * self._row_length - self._held
            columns = tuple(column[:room] for column in columns)
        for held, column in zip((self._tokens, self._segments, self._masks), columns, strict=True):
            held.append(column)
        self._held += len(columns[0])
        if self._held >= _ROWS_PER_BATCH * self._row_length:
            self._flush(_ROWS_PER_BATCH)

    def commit(self, settings: dict[str, Any]) -> None:
        self._flush(1)
        self._writer.close()
        self._writer = None
        self.committed_rows = self._written
        self.dropped = self._held
        meta = {
            "settings": settings,
            "rows": self._written,
            "row_length": self._row_length,
            "documents": self.documents,
            "digest": self._sha.hexdigest(),
        }
        features = _features_json(self._row_length, self._third)
        files = {
            "dataset_info.json": {"features": features},
            "state.json": {
                "_data_files": [{"filename": _DATA}],
                "_fingerprint": self._sha.hexdigest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            },
        }
        for name, value in files.items():
            (self.aside / name).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
        np.array(self._checksums, "<u4").tofile(self.aside / _CHECKSUMS)
        files_now = {
            name: {"size": size, "sha256": file_digest(self.aside / name)}
            for name, size in files_in(self.aside).items()
        }
        content = json.dumps({**meta, "files": files_now}, indent=1, sort_keys=True).encode()
        (self.aside / _META).write_bytes(content)
        publish_directory(self.aside, self.path, last=_META)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        shutil.rmtree(self.aside, ignore_errors=True)

    def _flush(self, multiple: int) -> None:
        """Write as many rows as are whole, in a multiple of `multiple`; keep the rest."""
        held = (self._tokens, self._segments, self._masks)
        columns = [np.concatenate(parts) for parts in held]
        whole = len(columns[0]) // self._row_length // multiple * multiple
        for first in range(0, whole, _ROWS_PER_BATCH):
            part = slice(first * self._row_length, min(first + _ROWS_PER_BATCH, whole) * self._row_length)
            self.write_rows(*(column[part].reshape(-1, self._row_length) for column in columns))
        used = whole * self._row_length
        self._held = len(columns[0]) - used
        for parts, column in zip(held, columns, strict=True):
            parts[:] = [column[used:]]

    def write_rows(self, tokens: IntArray, segments: IntArray, loss_mask: IntArray) -> None:
        """Ready rows [R, row_length], at most as many as one Arrow batch holds; all batches but the last must be full."""
        segments = np.where(segments == PADDING, PADDING, segments - segments[:, :1])  # numbered from 0 in every row
        third = loss_mask
        if self._masking is not None:
            tokens, third = mask_rows(tokens, self._written, self._masking)
        columns = [(tokens, pa.int32()), (segments, pa.int32())]
        if self._third is not None:
            columns.append((third, pa.int8() if self._third == _MASK else pa.int32()))
        batch = [_fixed_lists(values, kind) for values, kind in columns]
        self._writer.write_batch(pa.record_batch(batch, schema=self._schema))
        self._written += len(tokens)
        for values, _ in columns:
            self._sha.update(np.ascontiguousarray(values, "<i4").tobytes())
        self._checksums += [_row_checksum(row_CL) for row_CL in np.stack([values for values, _ in columns], 1)]


_MASK = "loss_mask"
_LABELS = "labels"


def _fixed_lists(values: IntArray, kind: Any) -> Any:
    flat = values.reshape(-1).astype(kind.to_pandas_dtype(), copy=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), values.shape[1])


def _features_json(row_length: int, third: str | None) -> dict[str, Any]:
    kinds = {"input_ids": "int32", "segment_ids": "int32"}
    if third is not None:
        kinds[third] = "int8" if third == _MASK else "int32"
    return {
        name: {"feature": {"dtype": kind, "_type": "Value"}, "length": row_length, "_type": "List"}
        for name, kind in kinds.items()
    }


def _features(row_length: int, third: str | None) -> Any:
    """Arrow schema with the metadata by which `datasets` knows its features."""
    features = _features_json(row_length, third)
    info = json.dumps({"info": {"features": features}})
    kinds = {"int32": pa.int32(), "int8": pa.int8()}
    columns = {name: pa.list_(kinds[spec["feature"]["dtype"]], row_length) for name, spec in features.items()}
    return pa.schema(columns, metadata={"huggingface": info})
