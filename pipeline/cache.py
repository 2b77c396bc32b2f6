"""The cache: a manifest, packed rows, and shards that exist once their commit record does.

    <cache>/manifest.json        format, identity, codec, shard table
    <cache>/codebook-*.zarr/     the codec's table of token ids, if it has one
    <cache>/corpus/              packed rows
    <cache>/shards/00000.zarr/   one Zarr group
    <cache>/shards/00000.json    commit record, written last: rows, size and checksum of every file

What exists is decided by manifest and commit records alone, never by looking at Zarr.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.codebook import Codebook
from pipeline.codec import Arrays, Rows, TargetCodec
from pipeline.corpus import IGNORE, TOKENIZER, IntArray, PackedRows
from pipeline.durable import (
    TEMPORARY,
    create_json,
    file_digest,
    json_digest,
    publish_directory,
    read_json,
    sync_directory,
    write_json,
)
from pipeline.errors import CorruptError, IncompleteError, MismatchError
from pipeline.masking import PADDING
from pipeline.models import document_mask
from pipeline.shards import CHUNK_CODECS, ShardReader, array_file, chunks_digest, read_group, write_group
from pipeline.signals import Signal
from pipeline.targets import SparseTargets

FORMAT_VERSION = 2

IndexArray = np.ndarray[Any, np.dtype[np.int64]]
_NOTHING: np.ndarray[Any, np.dtype[Any]] = np.empty(0, np.uint8)


class Batch(TypedDict):
    """Rows with their targets; one row has no batch axis B. Signals stand beside them under their names (`signals`)."""

    input_ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64: the token that targets[b, t] predicts, -100 where there is none
    segment_ids: Tensor  # [B, L] int64: which document of the row a token belongs to; -1: padding
    targets: SparseTargets  # [B, L]
    attention_mask: NotRequired[Tensor]  # [B, 1, L, L] bool, of masked rows: which tokens see each other


@dataclass(frozen=True)
class Manifest:
    """What a cache is: everything that determines its content, and how its rows are cut into shards."""

    identity: dict[str, Any]
    codec: TargetCodec
    rows: int
    row_length: int
    shard_rows: int
    signals: tuple[Signal, ...] = ()
    """What is kept beside the targets."""

    @property
    def objective(self) -> str:
        """causal or masked."""
        return str(self.identity["objective"])

    def layout(self) -> dict[str, str]:
        """Arrays of a shard and their dtypes."""
        return self.codec.layout() | {name: kind for signal in self.signals for name, kind in signal.layout().items()}

    def target_mask(self, labels: IndexArray, segment_ids: IntArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[R, L] bool: positions that have a target."""
        real = self.identity.get("targets_on") == "real"
        mask: np.ndarray[Any, np.dtype[np.bool_]] = segment_ids != PADDING if real else labels != IGNORE
        return mask

    @property
    def digest(self) -> str:
        """The identity as one digest."""
        return json_digest(self.identity)

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "identity_digest": self.digest,
            "codec": self.codec.to_json(),
            "chunk_codecs": CHUNK_CODECS[self.codec.profile],
            "layout": {"rows": self.rows, "row_length": self.row_length, "shard_rows": self.shard_rows},
            "shards": [list(self.shard_range(shard)) for shard in range(self.num_shards)],
        }

    @classmethod
    def read(cls, cache: Path) -> Manifest:
        """Raises IncompleteError where there is none, CorruptError where it contradicts itself."""
        file = cache / "manifest.json"
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise IncompleteError(
                f"{cache}: no cache here (manifest.json is missing): run `logit-cache cache`"
            ) from None
        except ValueError as error:
            raise CorruptError(f"{file}: not valid JSON ({error}): restore it or delete the cache") from error
        try:
            version = value["format_version"]
            if version != FORMAT_VERSION:
                raise MismatchError(
                    f"{file}: format version {version}, this program reads {FORMAT_VERSION}: upgrade it"
                )
            if value["chunk_codecs"] != CHUNK_CODECS.get(value["codec"]["profile"]):
                raise MismatchError(
                    f"{file}: chunk codecs {value['chunk_codecs']} are not those that this program reads"
                )
            layout = value["layout"]
            codec = TargetCodec.from_json(value["codec"], _read_codebook(cache, value["codec"]))
            signals = tuple(Signal.from_json(signal) for signal in value["identity"]["signals"][1:])
            manifest = cls(
                value["identity"], codec, layout["rows"], layout["row_length"], layout["shard_rows"], signals
            )
            identity = value["identity"]
            described = (identity["codec"], identity["row_length"], identity["shard_rows"])
            actual = (value["codec"], manifest.row_length, manifest.shard_rows)
            named = ["targets", *(signal.to_json() for signal in manifest.signals)]
            whole = manifest.to_json() == value and described == actual and identity["signals"] == named
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{file}: not a manifest ({error!r}): restore it or delete the cache") from error
        if not whole:
            raise CorruptError(f"{file}: its parts contradict each other: restore it or delete the cache")
        return manifest

    @classmethod
    def create(
        cls,
        teacher: dict[str, Any],
        corpus: PackedRows,
        codec: TargetCodec,
        shard_rows: int,
        seed: int,
        signals: tuple[Signal, ...] = (),
        targets_on: str = "real",
    ) -> Manifest:
        """The manifest of a new cache; `seed` matters to supports that draw samples, `targets_on` to masked rows."""
        identity = {
            "format_version": FORMAT_VERSION,
            "teacher": teacher,
            "corpus": corpus.meta["digest"],
            "row_length": corpus.row_length,
            "objective": corpus.objective,
            "support": codec.support.to_json(),
            "knots": list(codec.knots),
            "codec": codec.to_json(),
            "shard_rows": shard_rows,
            "signals": ["targets", *(signal.to_json() for signal in signals)],
        }
        if corpus.objective == "masked":
            identity["targets_on"] = targets_on
        if codec.support.has_samples:
            identity["seed"] = seed
        return cls(identity, codec, corpus.rows, corpus.row_length, shard_rows, signals)

    def with_codec(self, codec: TargetCodec) -> Manifest:
        """The same cache with a codec that has learned."""
        return replace(self, codec=codec, identity={**self.identity, "codec": codec.to_json()})


class CacheWriter:
    """Writes the shards of one cache, each as a whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Start or continue a cache. Raises MismatchError naming the fields in which the existing one differs."""
        self.path, self.manifest = path, manifest
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self.begun = (path / "manifest.json").exists()
        """Whether the manifest is written, and with it what the codec has learned."""
        if self.begun:
            self._join()

    def begin(self, codec: TargetCodec) -> None:
        """Write the manifest with a codec that has learned. Where another task was first, what that one learned holds."""
        learned = self.manifest.with_codec(codec)
        book = codec.codebook
        if book is not None:
            folder = _codebook_path(self.path, book.digest)
            aside = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY}")
            shutil.rmtree(aside, ignore_errors=True)
            write_group(aside, book.arrays(), codec.profile)
            # Named by its content: one that is there is the same, and may be being read.
            publish_directory(aside, folder, replace=False)
        if create_json(self.path / "manifest.json", learned.to_json()):
            self.manifest = learned
        else:
            self._join()
        self.begun = True

    def _join(self) -> None:
        existing = Manifest.read(self.path)
        learned = existing.codec
        expected = self.manifest.with_codec(
            replace(self.manifest.codec, tail_prediction=learned.tail_prediction, codebook=learned.codebook)
        )
        if existing.digest != expected.digest:
            raise MismatchError(
                f"{self.path}: this cache was begun with another identity: "
                + "; ".join(_differences(existing.identity, expected.identity))
                + ": choose another run_dir, or delete the cache"
            )
        self.manifest = existing

    def pending(self, task: int = 0, num_tasks: int = 1) -> list[int]:
        """Shards of this task that are not committed. What an interrupted run left of them is removed."""
        mine = range(task, self.manifest.num_shards, num_tasks)
        missing = [shard for shard in mine if not _record_path(self.path, shard).exists()]
        for shard in missing:
            for leftover in (_shard_path(self.path, shard), self._aside(shard)):
                shutil.rmtree(leftover, ignore_errors=True)
        return missing

    def write(
        self,
        shard: int,
        targets: SparseTargets,
        input_ids: IntArray,
        rows_digest: str,
        teacher_nats: float,
        signals: Arrays | None = None,
        labels: int | None = None,
    ) -> None:
        """Commit one shard: targets and tokens [rows, L], the digest of its rows, the teacher's own loss over them.

        `signals` are the arrays of all signals' layouts, `labels` the positions that the loss was summed over where those
        are not the positions with a target.
        """
        start, stop = self.manifest.shard_range(shard)
        aside, final = self._aside(shard), _shard_path(self.path, shard)
        shutil.rmtree(aside, ignore_errors=True)
        codec = self.manifest.codec
        write_group(aside, codec.encode(targets, input_ids) | (signals or {}), codec.profile)
        files = {}
        for file in sorted(p for p in aside.rglob("*") if p.is_file()):
            name = file.relative_to(aside).as_posix()
            files[name] = {"size": file.stat().st_size, "sha256": file_digest(file)}
            if "/c/" in name:
                files[name]["chunks_sha256"] = chunks_digest(file, stop - start)
        publish_directory(aside, final)
        record = {
            "shard": shard,
            "rows": [start, stop],
            "rows_sha256": rows_digest,
            "identity_digest": self.manifest.digest,
            "positions": int(targets.mask.sum()),
            **({} if labels is None else {"labels": labels}),
            "teacher_nats": teacher_nats,
            "files": files,
        }
        write_json(_record_path(self.path, shard), record)

    def _aside(self, shard: int) -> Path:
        path = _shard_path(self.path, shard)
        return path.with_name(path.name + TEMPORARY)


class LogitCache(Dataset[Batch]):
    """Cached rows with their targets, for reading.

    `len(cache)` rows; `cache[7]` one of them as a dict; `cache.batch([3, 1, 2])` several, stacked, decoded together. A map
    style torch Dataset for DataLoader (with `collate`) and Trainer, safe in forked and spawned workers. `views.RowStream`
    makes an iterable one of it.

    Raises IncompleteError if shards are missing, unless `partial`: then only rows of committed shards are seen.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.records = {}
        for shard in range(self.manifest.num_shards):
            record = read_record(self.path, self.manifest, shard)
            if record is not None:
                self.records[shard] = record
        self.complete = len(self.records) == self.manifest.num_shards
        if not self.complete and not partial:
            raise IncompleteError(
                f"{self.path}: {len(self.records)} of {self.manifest.num_shards} shards are there: "
                "run `logit-cache cache` to finish it"
            )
        self.corpus = PackedRows(self.path / "corpus")
        if self.corpus.meta["digest"] != self.manifest.identity["corpus"]:
            raise MismatchError(
                f"{self.path}: corpus/ holds other rows (digest {self.corpus.meta['digest'][:12]}) than were cached "
                f"(digest {str(self.manifest.identity['corpus'])[:12]})"
            )
        ranges = [np.arange(*self.manifest.shard_range(shard)) for shard in sorted(self.records)]
        self._rows: IndexArray = np.concatenate([*ranges, np.empty(0, np.int64)]).astype(np.int64)
        self._readers: dict[int, ShardReader] = {}

    @property
    def vocab_size(self) -> int:
        return self.manifest.codec.vocab_size

    @property
    def row_length(self) -> int:
        return self.manifest.row_length

    @property
    def objective(self) -> str:
        """causal or masked: what labels and targets predict."""
        return self.manifest.objective

    @property
    def signals(self) -> dict[str, Signal]:
        """What rows have beside the targets, by name."""
        return {signal.name: signal for signal in self.manifest.signals}

    @property
    def knots(self) -> tuple[float, ...]:
        """Inverse temperatures at which the tail's mass is kept."""
        return self.manifest.codec.knots

    @property
    def digest(self) -> str:
        """The identity as one digest."""
        return self.manifest.digest

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the rows."""
        return str(self.manifest.identity["teacher"]["tokenizer"])

    @property
    def tokenizer_dir(self) -> Path:
        """Where that tokenizer can be loaded from."""
        return self.path / "corpus" / TOKENIZER

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which document of its row every token belongs to [R, L], without reading targets."""
        return self.corpus.take(self._rows[indices])[1]

    @cached_property
    def positions(self) -> int:
        """Positions with a target."""
        return sum(int(record["positions"]) for record in self.records.values())

    @cached_property
    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy on the labels, mean per label in nats."""
        labels = sum(int(record.get("labels", record["positions"])) for record in self.records.values())
        return sum(float(record["teacher_nats"]) for record in self.records.values()) / max(labels, 1)

    @cached_property
    def bytes(self) -> int:
        """Size of everything but corpus/."""
        files = (p for p in self.path.rglob("*") if p.is_file() and "corpus" not in p.relative_to(self.path).parts[:1])
        return sum(file.stat().st_size for file in files)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """One row: input_ids, labels, segment_ids [L] and targets [L]."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several rows, decoded together; DataLoader prefers this to one at a time."""
        return split(self.batch(indices))

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """Rows in the order asked for, stacked on a leading axis."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) == 0 or wanted.min() < -len(self) or wanted.max() >= len(self):
            raise IndexError(f"rows {list(indices)} are outside 0..{len(self) - 1}")
        rows = self._rows[wanted]
        input_ids, segment_ids = self.corpus.take(rows)
        labels = self.corpus.labels(rows)
        shards = rows // self.manifest.shard_rows
        stored: Rows = {name: [_NOTHING] * len(rows) for name in self.manifest.layout()}
        for shard in np.unique(shards):
            slots = np.flatnonzero(shards == shard)
            part = self._reader(int(shard)).read(rows[slots] - int(shard) * self.manifest.shard_rows)
            for name, values in part.items():
                for slot, value in zip(slots, values, strict=True):
                    stored[name][slot] = value
        try:
            mask = self.manifest.target_mask(labels, segment_ids)
            targets = self.manifest.codec.decode(stored, input_ids, mask)
            signals = {signal.name: signal.decode(stored, self.row_length) for signal in self.manifest.signals}
        except (ValueError, IndexError) as error:
            raise CorruptError(
                f"{self.path}: rows of shards {np.unique(shards).tolist()} do not decode ({error}): run `logit-cache verify`"
            ) from error
        batch = Batch(
            input_ids=torch.from_numpy(input_ids).long(),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segment_ids).long(),
            targets=targets,
        )
        if self.objective == "masked":
            batch["attention_mask"] = document_mask(batch["segment_ids"])
        return cast(Batch, {**batch, **signals})

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            start, stop = self.manifest.shard_range(shard)
            files = self.records[shard]["files"]
            path, codec = _shard_path(self.path, shard), self.manifest.codec
            self._readers[shard] = ShardReader(path, self.manifest.layout(), codec.profile, stop - start, files)
        return self._readers[shard]


def split(batch: Batch) -> list[Batch]:
    """The rows of a batch, the inverse of `collate`."""
    return [each(batch, lambda value, row=row: value[row]) for row in range(len(batch["labels"]))]


def each(batch: Batch, function: Any) -> Batch:
    """A batch of what `function` makes of every part of this one: tensors, and targets, which are indexed like them."""
    return cast(Batch, {name: function(value) for name, value in batch.items()})


def collate(rows: list[Batch]) -> Batch:
    """Stack rows of a cache into a batch; the `collate_fn` for a DataLoader, the `data_collator` for a Trainer."""
    if rows and "targets" not in rows[0]:
        raise ValueError(
            "the rows have no 'targets': Trainer drops columns that the model does not name unless its arguments say "
            "remove_unused_columns=False"
        )
    parts = {name: [cast(dict[str, Any], row)[name] for row in rows] for name in rows[0]}
    return cast(
        Batch,
        {name: (SparseTargets if name == "targets" else torch).stack(values) for name, values in parts.items()},
    )


def read_record(cache: Path, manifest: Manifest, shard: int) -> dict[str, Any] | None:
    """The commit record of a shard, or None where it is not committed. Raises CorruptError for a damaged one."""
    file = _record_path(cache, shard)
    record: dict[str, Any] | None = read_json(file, "run `logit-cache verify --repair`")
    if record is None:
        return None
    try:
        if record["shard"] != shard or tuple(record["rows"]) != manifest.shard_range(shard):
            raise CorruptError(f"{file}: it is the record of another shard: run `logit-cache verify --repair`")
        if record["identity_digest"] != manifest.digest:
            raise CorruptError(f"{file}: it belongs to another cache: run `logit-cache verify --repair`")
        if not all(array_file(name, record["files"]) for name in manifest.layout()):
            raise CorruptError(f"{file}: files are missing from it: run `logit-cache verify --repair`")
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{file}: not a commit record ({error!r}): run `logit-cache verify --repair`") from error
    return record


def verify(cache: Path) -> dict[int, str]:
    """Check every byte of every committed shard. Returns what is wrong, by shard; empty if all is well.

    Raises IncompleteError, CorruptError or MismatchError where manifest or corpus cannot be used at all.
    """
    manifest = Manifest.read(cache)
    corpus = PackedRows(cache / "corpus")
    bad: dict[int, str] = {}
    for shard in range(manifest.num_shards):
        try:
            record = read_record(cache, manifest, shard)
            if record is not None:
                _verify_shard(cache, manifest, corpus, shard, record)
        except CorruptError as error:
            bad[shard] = str(error)
    return bad


def drop_shard(cache: Path, shard: int) -> None:
    """Un-commit a shard, so that `cache` fills it again."""
    _record_path(cache, shard).unlink(missing_ok=True)
    sync_directory(cache / "shards")
    shutil.rmtree(_shard_path(cache, shard), ignore_errors=True)


def _verify_shard(cache: Path, manifest: Manifest, corpus: PackedRows, shard: int, record: dict[str, Any]) -> None:
    folder = _shard_path(cache, shard)
    for name, expected in record["files"].items():
        file = folder / name
        if not file.is_file():
            raise CorruptError(f"{file}: missing")
        if file.stat().st_size != expected["size"]:
            raise CorruptError(f"{file}: {file.stat().st_size:,} bytes where {expected['size']:,} were written")
        if file_digest(file) != expected["sha256"]:
            raise CorruptError(f"{file}: its checksum differs from the commit record")
    extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(record["files"])
    if extra:
        raise CorruptError(f"{folder}: files that were never committed: {', '.join(sorted(extra))}")
    if corpus.digest(*manifest.shard_range(shard)) != record["rows_sha256"]:
        raise CorruptError(f"{cache / 'corpus'}: rows of shard {shard} are not those that the teacher saw")


def _shard_path(cache: Path, shard: int) -> Path:
    return cache / "shards" / f"{shard:05}.zarr"


def _codebook_path(cache: Path, digest: str) -> Path:
    return cache / f"codebook-{digest[:12]}.zarr"


def _read_codebook(cache: Path, codec: dict[str, Any]) -> Codebook | None:
    if codec["codebook"] is None:
        return None
    folder = _codebook_path(cache, codec["codebook"])
    try:
        book = Codebook.from_arrays(codec["vocab_size"], read_group(folder))
        if book.digest == codec["codebook"]:
            return book
        problem = "its content is not what the manifest names"
    except Exception as error:  # zarr raises many kinds
        problem = repr(error)
    raise CorruptError(f"{folder}: the codebook cannot be read ({problem}): restore it or delete the cache")


def _record_path(cache: Path, shard: int) -> Path:
    return cache / "shards" / f"{shard:05}.json"


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Fields in which two identities differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if old == new else [f"{name} is {_short(old)} there and {_short(new)} now"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
