"""From text to packed rows: documents -> tokens -> rows of equal length, written as Arrow.

Documents are joined end to end, each closed by the tokenizer's end-of-sequence token, and cut into rows. `segment_ids`
number the documents inside a row, so that attention and positions can restart at their boundaries. Whole documents are
held out, chosen by a hash of their text: copies of one document land on the same side.

On disk a corpus is a directory that `datasets.load_from_disk` opens.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CorpusConfig, Recipe
from pipeline.durable import TEMPORARY, json_digest, publish_directory
from pipeline.errors import CorruptError, IncompleteError, MismatchError, RecipeError
from pipeline.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
_ROWS_PER_BATCH = 1024
_META = "prepared.json"
TOKENIZER = "tokenizer"  # what made the rows, kept beside them

IntArray = np.ndarray[Any, np.dtype[np.int32]]


class PackedRows:
    """The rows of one corpus directory, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Raises IncompleteError where nothing was prepared, CorruptError where the files cannot be read."""
        self.path = path
        try:
            self.meta: dict[str, Any] = json.loads((path / _META).read_text(encoding="utf-8"))
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            file = path / state["_data_files"][0]["filename"]
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_stream(source).read_all()
        except FileNotFoundError as error:
            raise IncompleteError(f"{path}: no prepared corpus here: run `logit-cache prepare` first") from error
        except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
            raise CorruptError(f"{path}: the corpus cannot be read ({error}): delete it and run `prepare`") from error
        self.rows: int = table.num_rows
        self.row_length: int = self.meta["row_length"]
        self._columns = {
            name: [chunk.flatten().to_numpy().reshape(-1, self.row_length) for chunk in table[name].chunks]
            for name in ("input_ids", "segment_ids")
        }
        if self.rows != self.meta["rows"]:
            raise CorruptError(f"{path}: {self.rows} rows where {self.meta['rows']} were prepared: run `prepare` again")

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[IntArray, IntArray]:
        """input_ids and segment_ids, both [len(rows), row_length] int32."""
        return self._take("input_ids", rows), self._take("segment_ids", rows)

    def _take(self, column: str, rows: np.ndarray[Any, np.dtype[np.int64]]) -> IntArray:
        chunks = self._columns[column]
        out = np.empty((len(rows), self.row_length), np.int32)
        for slot, row in enumerate(rows):
            out[slot] = chunks[row // _ROWS_PER_BATCH][row % _ROWS_PER_BATCH]
        return out

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """sha256 of the rows' tokens and boundaries."""
        sha = hashlib.sha256()
        for first in range(start, self.rows if stop is None else stop, _ROWS_PER_BATCH):
            last = min(first + _ROWS_PER_BATCH, self.rows if stop is None else stop)
            for part in self.take(np.arange(first, last)):
                sha.update(np.ascontiguousarray(part, "<i4").tobytes())
        return sha.hexdigest()


def next_token_labels(input_ids: IntArray, segment_ids: IntArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """labels[..., t] = the token after t in the same document, -100 at row ends and document ends."""
    labels = np.full(input_ids.shape, IGNORE, np.int64)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
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

    prefix, suffix = _document_frame(tokenizer)
    limits = {"train": config.max_rows, "heldout": config.max_heldout_rows}
    writers = {side: _RowWriter(path, config.row_length, limits[side]) for side, path in sides.items()}
    documents = 0
    try:
        lowest: tuple[float, str] | None = None
        for text in _documents(config):
            documents += 1
            draw = _heldout_draw(text, recipe.seed)
            if lowest is None or draw < lowest[0]:
                lowest = (draw, text)
            side = "heldout" if draw < config.heldout_fraction else "train"
            if not writers[side].full:
                writers[side].add(_encode(tokenizer, text, prefix, suffix))
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
            for text in _documents(config):
                side = "heldout" if text == lowest[1] else "train"
                if not writers[side].full:
                    writers[side].add(_encode(tokenizer, text, prefix, suffix))
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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, prefix: list[int], suffix: list[int]) -> IntArray:
    # verbose=False: a document longer than the model's positions is no mistake here, it is cut into rows.
    ids = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"]
    return np.asarray([*prefix, *ids, *suffix], np.int32)


def _documents(config: CorpusConfig) -> Iterator[str]:
    """The non-empty documents of a corpus, in order."""
    for text in _raw_documents(config):
        if text.strip():
            yield text


def _raw_documents(config: CorpusConfig) -> Iterator[str]:
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


def _text_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[str]:
    data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}: not valid UTF-8 at byte {error.start} (line {line}): convert it, for example with iconv"
        ) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    yield from text.split(config.document_separator) if config.document_separator else [text]


def _jsonl_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[str]:
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
        yield _text_of(record if isinstance(record, dict) else {}, f"line {number} of {name}", config)


def _parquet_documents(stream: IO[bytes], name: str, config: CorpusConfig) -> Iterator[str]:
    table = pq.ParquetFile(stream)
    columns = table.schema_arrow.names
    if config.text_column not in columns:
        _text_of(dict.fromkeys(columns), name, config)
    for batch in table.iter_batches(columns=[config.text_column]):
        for record in batch.to_pylist():
            yield _text_of(record, name, config)


def _hub_documents(config: CorpusConfig) -> Iterator[str]:
    import datasets

    if not isinstance(config.source, str):
        raise RecipeError("corpus.source must be one dataset name with format = 'hub'")
    try:
        data = datasets.load_dataset(config.source, config.hub_config, split=config.hub_split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"corpus.source: data set {config.source!r} cannot be loaded: {first}") from error
    for number, record in enumerate(data):
        yield _text_of(record, f"record {number} of {config.source}", config)


def _text_of(record: dict[str, Any], where: str, config: CorpusConfig) -> str:
    text = record.get(config.text_column)
    if not isinstance(text, str):
        raise RecipeError(
            f"corpus: {where} has no text in column {config.text_column!r} (columns: {', '.join(record) or 'none'}): "
            "set corpus.text_column"
        )
    return text


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


def _already_prepared(path: Path, settings: dict[str, Any]) -> bool:
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise CorruptError(f"{path / _META}: not valid JSON ({error}): delete {path} and run `prepare`") from error
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


class _RowWriter:
    """Packs tokens into rows and streams them to an Arrow file beside the final place."""

    def __init__(self, path: Path, row_length: int, limit: int | None) -> None:
        self.path, self._row_length, self._limit = path, row_length, limit
        self.aside = path.with_name(path.name + TEMPORARY)
        self._writer: Any = None
        self.committed_rows = 0
        self.restart()

    def restart(self) -> None:
        self.discard()
        self.aside.mkdir(parents=True)
        self._schema = _features(self._row_length)
        self._writer = pa.ipc.new_stream(str(self.aside / _DATA), self._schema)
        self._tokens = [np.empty(0, np.int32)]
        self._segments = [np.empty(0, np.int32)]
        self._held = 0
        self._written = 0
        self._sha = hashlib.sha256()
        self.documents = self.tokens = 0

    @property
    def rows(self) -> int:
        return self._written + self._held // self._row_length

    @property
    def full(self) -> bool:
        return self._limit is not None and self.rows >= self._limit

    def add(self, tokens: IntArray) -> None:
        if self.full:
            return
        self.documents += 1
        self.tokens += len(tokens)
        if self._limit is not None:
            tokens = tokens[: (self._limit - self._written) * self._row_length - self._held]
        self._tokens.append(tokens)
        self._segments.append(np.full(len(tokens), self.documents, np.int32))
        self._held += len(tokens)
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
        files = {
            _META: meta,
            "dataset_info.json": {"features": _features_json(self._row_length)},
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
        publish_directory(self.aside, self.path)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        shutil.rmtree(self.aside, ignore_errors=True)

    def _flush(self, multiple: int) -> None:
        """Write as many rows as are whole, in a multiple of `multiple`; keep the rest."""
        tokens, segments = np.concatenate(self._tokens), np.concatenate(self._segments)
        whole = len(tokens) // self._row_length // multiple * multiple
        for first in range(0, whole, _ROWS_PER_BATCH):
            part = slice(first * self._row_length, min(first + _ROWS_PER_BATCH, whole) * self._row_length)
            self._write(tokens[part].reshape(-1, self._row_length), segments[part].reshape(-1, self._row_length))
        used = whole * self._row_length
        self._tokens, self._segments, self._held = [tokens[used:]], [segments[used:]], len(tokens) - used

    def _write(self, tokens: IntArray, segments: IntArray) -> None:
        segments = segments - segments[:, :1]  # numbered from 0 in every row
        columns = [_fixed_lists(tokens), _fixed_lists(segments)]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._written += len(tokens)
        self._sha.update(np.ascontiguousarray(tokens, "<i4").tobytes())
        self._sha.update(np.ascontiguousarray(segments, "<i4").tobytes())


_DATA = "data-00000-of-00001.arrow"


def _fixed_lists(values: IntArray) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.int32()), values.shape[1])


def _features_json(row_length: int) -> dict[str, Any]:
    column = {"feature": {"dtype": "int32", "_type": "Value"}, "length": row_length, "_type": "List"}
    return {"input_ids": column, "segment_ids": column}


def _features(row_length: int) -> Any:
    """Arrow schema with the metadata by which `datasets` knows its features."""
    info = json.dumps({"info": {"features": _features_json(row_length)}})
    column = pa.list_(pa.int32(), row_length)
    return pa.schema({"input_ids": column, "segment_ids": column}, metadata={"huggingface": info})
