"""The cache: a manifest, packed rows, and shards that exist once their commit record does.

    <cache>/manifest.json        format, identity, codec, shard table
    <cache>/codebook-*.zarr/     the codec's table of token ids, if it has one
    <cache>/corpus/              packed rows
    <cache>/shards/00000.zarr/   one Zarr group
    <cache>/shards/00000.json    commit record, written last: rows, size and checksum of every file

What exists is decided by manifest and commit records alone, never by looking at Zarr. Every file is tied to the manifest by
checksums: shards by their records, whose `record_sha256` covers the record itself, the codebook by its digest in the codec,
the corpus by that of its `prepared.json`.

Tasks need no locks. Each writes a shard where no other does and gives it its name in one step; the record is created where
none is. Whoever finds another's record there checks that it fits what lies there, and else takes it back and writes again.

A cache may lie on an object store (`storage`), where a shard's files are written in place, before its record.
"""

from __future__ import annotations

import math
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.codebook import Codebook
from pipeline.codec import Arrays, Rows, TargetCodec, check_vocab_size
from pipeline.durable import (
    TEMPORARY,
    create_json,
    file_digest,
    json_digest,
    parse_json,
    publish_directory,
    read_json,
    remove_tree,
    sync_directory,
    written_aside,
)
from pipeline.errors import CorruptError, IncompleteError, MismatchError, StorageError
from pipeline.masking import PADDING
from pipeline.models import document_mask
from pipeline.rows import IGNORE, TOKENIZER, IntArray, PackedRows, verify_corpus
from pipeline.shards import CHUNK_CODECS, ShardReader, array_file, chunk_checksums, read_group, write_group
from pipeline.signals import Signal
from pipeline.storage import Place, RemotePath, files_in, names_in, place, read_all
from pipeline.targets import SparseTargets

FORMAT_VERSION = 3
ACCEPTABLE = ("teacher.source", "teacher.revision")
"""Fields of the identity that say where something came from: the digests beside them say what it is."""

IndexArray = np.ndarray[Any, np.dtype[np.int64]]
_ROUND_TRIPS = 16  # at the same time
_RECORDS_AT_ONCE = 1024
_REPAIR = "run `logit-cache verify --repair`"
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
    prepared: str
    """Digest of the corpus, its tokenizer and every other file included."""
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
            "prepared_sha256": self.prepared,
            "shards": [list(self.shard_range(shard)) for shard in range(self.num_shards)],
        }

    @classmethod
    def read(cls, cache: Place) -> Manifest:
        """Raises IncompleteError where there is none, CorruptError where it contradicts itself."""
        file = cache / "manifest.json"
        value = read_json(file, "restore it or delete the cache")
        if value is None:
            raise IncompleteError(f"{cache}: no cache here (manifest.json is missing): run `logit-cache cache`")
        try:
            version = value["format_version"]
            if version != FORMAT_VERSION:
                older = type(version) is int and version < FORMAT_VERSION
                remedy = "cache again, or read it with the program that wrote it" if older else "upgrade this program"
                raise MismatchError(f"{file}: format version {version}, this program reads {FORMAT_VERSION}: {remedy}")
            if value["chunk_codecs"] != CHUNK_CODECS.get(value["codec"]["profile"]):
                raise MismatchError(
                    f"{file}: chunk codecs {value['chunk_codecs']} are not those that this program reads"
                )
            layout, identity = value["layout"], value["identity"]
            rows, row_length, shard_rows = (layout[name] for name in ("rows", "row_length", "shard_rows"))
            if not all(type(number) is int and number >= 0 for number in (rows, row_length, shard_rows)):
                raise ValueError("its layout is not made of numbers")
            # Before anything is made as large as it says.
            if shard_rows < 1 or len(value["shards"]) != -(-rows // shard_rows):
                raise ValueError("its table of shards does not fit its rows")
            codec = TargetCodec.from_json(value["codec"], _read_codebook(cache, value["codec"]))
            signals = tuple(Signal.from_json(signal) for signal in identity["signals"][1:])
            manifest = cls(identity, codec, rows, row_length, shard_rows, value["prepared_sha256"], signals)
            described = (identity["codec"], identity["row_length"], identity["shard_rows"])
            named = ["targets", *(signal.to_json() for signal in signals)]
            whole = (
                manifest.to_json() == value
                and described == (value["codec"], row_length, shard_rows)
                and identity["signals"] == named
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
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
        return cls(identity, codec, corpus.rows, corpus.row_length, shard_rows, corpus.stamp, signals)

    def with_codec(self, codec: TargetCodec) -> Manifest:
        """The same cache with a codec that has learned."""
        return replace(self, codec=codec, identity={**self.identity, "codec": codec.to_json()})


class CacheWriter:
    """Writes the shards of one cache, each as a whole."""

    def __init__(self, path: Place, manifest: Manifest, *, accept: Sequence[str] = ()) -> None:
        """Start or continue a cache. Raises MismatchError naming the fields in which the existing one differs.

        `accept` names those of ACCEPTABLE in which it may: the cache keeps what it was begun with.
        """
        self.path, self.manifest, self._accept = path, manifest, accept
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self.begun = (path / "manifest.json").exists()
        """Whether the manifest is written, and with it what the codec has learned."""
        self._leftovers: dict[str, list[str]] = {}
        if self.begun:
            self._join()

    def begin(self, codec: TargetCodec) -> None:
        """Write the manifest with a codec that has learned. Where another task was first, what that one learned holds."""
        learned = self.manifest.with_codec(codec)
        book = codec.codebook
        if book is not None:
            folder = _codebook_path(self.path, book.digest)
            with written_aside(folder) as aside:
                write_group(aside, book.arrays(), codec.profile)
                # Named by its content: one that is there is the same, and may be being read.
                publish_directory(aside, folder, replace=False)
        if create_json(self.path / "manifest.json", learned.to_json()):
            self.manifest = learned
        else:
            self._join()
            used = self.manifest.codec.codebook
            if book is not None and (used is None or used.digest != book.digest):
                remove_tree(_codebook_path(self.path, book.digest))
        self.begun = True

    def _join(self) -> None:
        existing = Manifest.read(self.path)
        learned = existing.codec
        expected = self.manifest.with_codec(
            replace(self.manifest.codec, tail_prediction=learned.tail_prediction, codebook=learned.codebook)
        )
        differences = _differences(existing.identity, expected.identity)
        refused = {field: told for field, told in differences.items() if field not in self._accept}
        if refused:
            safe = [field for field in differences if field in ACCEPTABLE]
            way_out = (
                f"it is the same teacher by its weights and tokenizer, so {' '.join(f'--accept {f}' for f in safe)} continues"
                if len(safe) == len(differences)
                else "choose another run_dir, or delete the cache"
            )
            raise MismatchError(
                f"{self.path}: this cache was begun with another identity: {'; '.join(refused.values())}: {way_out}"
            )
        if existing.prepared != expected.prepared:
            raise CorruptError(
                f"{self.path / 'corpus'}: not as it was when the cache was begun: delete it and run `prepare` again"
            )
        self.manifest = existing

    def pending(self, task: int = 0, num_tasks: int = 1) -> list[int]:
        """Shards of this task that are not committed. What killed processes left beside committed ones is removed."""
        mine = range(task, self.manifest.num_shards, num_tasks)
        names = names_in(self.path / "shards")
        missing = [shard for shard in mine if _record_path(self.path, shard).name not in names]
        for name in names:
            if TEMPORARY in name:
                self._leftovers.setdefault(name.partition(".")[0], []).append(name)
        for shard in set(mine) - set(missing):
            self._clear(shard)
        if self.begun:
            for name in names_in(self.path):
                if TEMPORARY in name and name.startswith(("manifest.json", "codebook-")):
                    remove_tree(self.path / name)
        return missing

    def _clear(self, shard: int) -> None:
        """Once a shard is committed, anyone may remove what others have begun of it: they will find it committed."""
        for name in self._leftovers.pop(f"{shard:05}", []):
            remove_tree(self.path / "shards" / name)

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
        are not the positions with a target. Nothing is done where another task has committed the shard.
        """
        start, stop = self.manifest.shard_range(shard)
        final, record_file = _shard_path(self.path, shard), _record_path(self.path, shard)
        codec = self.manifest.codec
        arrays = codec.encode(targets, input_ids) | (signals or {})
        facts = {
            "shard": shard,
            "rows": [start, stop],
            "rows_sha256": rows_digest,
            "identity_digest": self.manifest.digest,
            "positions": int(targets.mask.sum()),
            **({} if labels is None else {"labels": labels}),
            "teacher_nats": teacher_nats,
        }
        while not record_file.exists():
            with written_aside(final) as aside:
                write_group(aside, arrays, codec.profile)
                files: dict[str, dict[str, Any]] = {}
                for name, size in files_in(aside).items():
                    files[name] = {"size": size, "sha256": file_digest(aside / name)}
                    if "/c/" in name:
                        files[name]["crc32c"] = chunk_checksums((aside / name).read_bytes(), stop - start)
                if record_file.exists():
                    break  # and what is aside may have been cleared away
                publish_directory(aside, final)
            record = {**facts, "files": files}
            if create_json(record_file, {**record, "record_sha256": json_digest(record)}):
                break
            if self._fits(shard):
                break
            record_file.unlink(missing_ok=True)
        self._clear(shard)

    def _fits(self, shard: int) -> bool:
        """Whether a shard's record, which another task has written, is that of the files which lie there."""
        try:
            record = read_record(self.path, self.manifest, shard)
            if record is not None:
                _verify_files(_shard_path(self.path, shard), record)
        except (CorruptError, OSError):
            return False
        return record is not None


class LogitCache(Dataset[Batch]):
    """Cached rows with their targets, for reading.

    `len(cache)` rows; `cache[7]` one of them as a dict; `cache.batch([3, 1, 2])` several, stacked, decoded together. A map
    style torch Dataset for DataLoader (with `collate`) and Trainer, safe in forked and spawned workers. `views.RowStream`
    makes an iterable one of it.

    Raises IncompleteError if shards are missing, unless `partial`: then only rows of committed shards are seen. A shard's
    record and files are checked when something of it is first read.
    """

    def __init__(self, path: str | Path | RemotePath, *, partial: bool = False) -> None:
        self.path = place(path)
        self.manifest = Manifest.read(self.path)
        self.records = Records(self.path, self.manifest)
        self.complete = len(self.records) == self.manifest.num_shards
        if not self.complete and not partial:
            raise IncompleteError(
                f"{self.path}: {len(self.records)} of {self.manifest.num_shards} shards are there: "
                "run `logit-cache cache` to finish it"
            )
        self.corpus = PackedRows(self.path / "corpus")
        _check_corpus(self.corpus, self.manifest)
        self._rows: IndexArray | None = None
        """Numbers of the rows that are there, where some are not."""
        if not self.complete:
            ranges = [np.arange(*self.manifest.shard_range(shard)) for shard in self.records]
            self._rows = np.concatenate([*ranges, np.empty(0, np.int64)]).astype(np.int64)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = max(files // (2 * len(self.manifest.layout())), 1)

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
        """The identity as one digest; of an incomplete cache, also which shards were there."""
        return self.manifest.digest if self.complete else json_digest([self.manifest.digest, sorted(self.records)])

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the rows."""
        return str(self.manifest.identity["teacher"]["tokenizer"])

    @property
    def tokenizer_dir(self) -> Path:
        """Where that tokenizer can be loaded from."""
        return self.corpus.local / TOKENIZER

    def row_numbers(self, indices: IndexArray) -> IndexArray:
        """Numbers in the corpus of these rows: the same, but where the cache is not complete."""
        rows = np.asarray(indices, np.int64)
        return np.where(rows < 0, rows + len(self), rows) if self._rows is None else self._rows[rows]

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which document of its row every token belongs to [R, L], without reading targets."""
        return self.corpus.take(self.row_numbers(indices))[1]

    @cached_property
    def positions(self) -> int:
        """Positions with a target."""
        return sum(int(record["positions"]) for record in self.records.all())

    @cached_property
    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy on the labels, mean per label in nats."""
        labels = sum(int(record.get("labels", record["positions"])) for record in self.records.all())
        return sum(float(record["teacher_nats"]) for record in self.records.all()) / max(labels, 1)

    @cached_property
    def bytes(self) -> int:
        """Size of everything but corpus/."""
        return sum(size for name, size in files_in(self.path).items() if not name.startswith("corpus/"))

    def __len__(self) -> int:
        return self.manifest.rows if self._rows is None else len(self._rows)

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
        rows = self.row_numbers(wanted)
        input_ids, segment_ids, labels = self.corpus.examples(rows)
        shards = rows // self.manifest.shard_rows
        stored: Rows = {name: [_NOTHING] * len(rows) for name in self.manifest.layout()}
        slots = {int(shard): np.flatnonzero(shards == shard) for shard in np.unique(shards)}
        readers = {shard: self._reader(shard) for shard in slots}

        def read(shard: int) -> Rows:
            return readers[shard].read(rows[slots[shard]] - shard * self.manifest.shard_rows)

        for shard, part in zip(slots, self._map(read, list(slots)), strict=True):
            for name, values in part.items():
                for slot, value in zip(slots[shard], values, strict=True):
                    stored[name][slot] = value
        self._close_some()
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

    def _map(self, read: Callable[[int], Rows], shards: list[int]) -> Iterable[Rows]:
        """One after the other from a disk; at the same time where every shard is a round trip away."""
        if isinstance(self.path, Path) or len(shards) == 1:
            return map(read, shards)
        with ThreadPoolExecutor(min(len(shards), _ROUND_TRIPS)) as threads:
            return list(threads.map(read, shards))

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.pop(shard, None)
        if reader is None:
            start, stop = self.manifest.shard_range(shard)
            files = self.records[shard]["files"]
            path, codec = _shard_path(self.path, shard), self.manifest.codec
            reader = ShardReader(path, self.manifest.layout(), codec.profile, stop - start, files)
        self._readers[shard] = reader
        return reader

    def _close_some(self) -> None:
        """Let go of the shards that were read longest ago, where more are open than the process may have files."""
        while len(self._readers) > self._most_open:
            self._readers.popitem(last=False)[1].close()


class Records(Mapping[int, dict[str, Any]]):
    """The commit records of a cache by shard. One listing tells which there are; each is read and checked when asked for.

    There may be very many of them, and a reader needs one for each shard that it opens.
    """

    def __init__(self, cache: Place, manifest: Manifest) -> None:
        self._cache, self._manifest = cache, manifest
        names = names_in(cache / "shards")
        there = (f"{shard:05}.json" in names for shard in range(manifest.num_shards))
        self._shards = np.flatnonzero(np.fromiter(there, bool, manifest.num_shards))

    def __getitem__(self, shard: int) -> dict[str, Any]:
        """Raises KeyError for a shard that is not committed, CorruptError for a record that is damaged or gone."""
        if shard not in self:
            raise KeyError(shard)
        record = read_record(self._cache, self._manifest, shard)
        if record is None:
            raise CorruptError(f"{_record_path(self._cache, shard)}: it was there and is gone: {_REPAIR}")
        return record

    def all(self) -> Iterator[dict[str, Any]]:
        """All of them, in the order of the shards, fetched many at a time."""
        for first in range(0, len(self), _RECORDS_AT_ONCE):
            shards = self._shards[first : first + _RECORDS_AT_ONCE].tolist()
            files = [_record_path(self._cache, shard) for shard in shards]
            for shard, file, data in zip(shards, files, read_all(files), strict=True):
                if data is None:
                    raise CorruptError(f"{file}: it was there and is gone: {_REPAIR}")
                yield _checked_record(parse_json(data, file, _REPAIR), file, self._manifest, shard)

    def __contains__(self, shard: object) -> bool:
        place = np.searchsorted(self._shards, shard) if isinstance(shard, int) else len(self)
        return bool(place < len(self) and self._shards[place] == shard)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shards.tolist())

    def __len__(self) -> int:
        return len(self._shards)


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


def read_record(cache: Place, manifest: Manifest, shard: int) -> dict[str, Any] | None:
    """The commit record of a shard, or None where it is not committed. Raises CorruptError for a damaged one."""
    file = _record_path(cache, shard)
    value = read_json(file, _REPAIR)
    return None if value is None else _checked_record(value, file, manifest, shard)


def _checked_record(record: Any, file: Place, manifest: Manifest, shard: int) -> dict[str, Any]:
    try:
        if record["shard"] != shard or tuple(record["rows"]) != manifest.shard_range(shard):
            raise CorruptError(f"{file}: it is the record of another shard: {_REPAIR}")
        if record["identity_digest"] != manifest.digest:
            raise CorruptError(f"{file}: it belongs to another cache: {_REPAIR}")
        if (
            json_digest({key: value for key, value in record.items() if key != "record_sha256"})
            != record["record_sha256"]
        ):
            raise CorruptError(f"{file}: not as it was written: {_REPAIR}")
        files: dict[str, Any] = record["files"]
        if not all(array_file(name, files) for name in manifest.layout()):
            raise CorruptError(f"{file}: files are missing from it: {_REPAIR}")
        for name, facts in files.items():
            plain = all(part.strip(".") for part in name.split("/"))
            if not plain or type(facts["size"]) is not int or type(facts["sha256"]) is not str:
                raise CorruptError(f"{file}: {name!r} is not a file of a shard: {_REPAIR}")
        if type(record["positions"]) is not int or not math.isfinite(record["teacher_nats"]):
            raise CorruptError(f"{file}: its sums are not numbers: {_REPAIR}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{file}: not a commit record ({error!r}): {_REPAIR}") from error
    checked: dict[str, Any] = record
    return checked


def verify(cache: Place) -> dict[int, str]:
    """Check every byte of every committed shard. Returns what is wrong, by shard; empty if all is well.

    Raises IncompleteError, CorruptError or MismatchError where manifest or corpus cannot be used at all: there is no shard
    to be dropped for that.
    """
    manifest = Manifest.read(cache)
    verify_corpus(cache / "corpus")
    corpus = PackedRows(cache / "corpus")
    _check_corpus(corpus, manifest)
    bad: dict[int, str] = {}
    for shard in range(manifest.num_shards):
        try:
            record = read_record(cache, manifest, shard)
            if record is not None:
                _verify_files(_shard_path(cache, shard), record)
                if corpus.digest(*manifest.shard_range(shard)) != record["rows_sha256"]:
                    raise CorruptError(f"{cache / 'corpus'}: rows of shard {shard} are not those that the teacher saw")
        except CorruptError as error:
            bad[shard] = str(error)
    return bad


def drop_shard(cache: Place, shard: int) -> None:
    """Un-commit a shard, so that `cache` fills it again."""
    _record_path(cache, shard).unlink(missing_ok=True)
    if isinstance(cache, Path):
        sync_directory(cache / "shards")
    remove_tree(_shard_path(cache, shard))


def _verify_files(folder: Place, record: dict[str, Any]) -> None:
    """Compare the files of a shard with its commit record. Raises CorruptError naming one that differs."""
    found = files_in(folder)
    for name, expected in record["files"].items():
        file = folder / name
        if name not in found:
            raise CorruptError(f"{file}: missing")
        if found[name] != expected["size"]:
            raise CorruptError(f"{file}: {found[name]:,} bytes where {expected['size']:,} were written")
        if file_digest(file) != expected["sha256"]:
            raise CorruptError(f"{file}: its checksum differs from the commit record")
        start, stop = record["rows"]
        if "/c/" in name and chunk_checksums(file.read_bytes(), stop - start) != expected.get("crc32c"):
            raise CorruptError(f"{file}: its chunks have other checksums than the commit record says")
    extra = set(found) - set(record["files"])
    if extra:
        raise CorruptError(f"{folder}: files that were never committed: {', '.join(sorted(extra))}")


def _check_corpus(corpus: PackedRows, manifest: Manifest) -> None:
    there, cached = corpus.meta.get("digest"), manifest.identity["corpus"]
    if there != cached:
        raise MismatchError(
            f"{corpus.path}: other rows (digest {_short(there)}) than were cached (digest {_short(cached)})"
        )
    if (corpus.stamp, corpus.rows, corpus.row_length) != (manifest.prepared, manifest.rows, manifest.row_length):
        raise CorruptError(f"{corpus.path}: not as it was when the cache was begun: delete it and run `prepare` again")


def _shard_path(cache: Place, shard: int) -> Place:
    return cache / "shards" / f"{shard:05}.zarr"


def _codebook_path(cache: Place, digest: str) -> Place:
    return cache / f"codebook-{digest[:12]}.zarr"


def _read_codebook(cache: Place, codec: dict[str, Any]) -> Codebook | None:
    digest, vocab_size = codec["codebook"], codec["vocab_size"]
    if digest is None:
        return None
    if not (isinstance(digest, str) and digest.isalnum()):
        raise ValueError(f"{digest!r} is not the digest of a codebook")
    check_vocab_size(vocab_size)
    folder = _codebook_path(cache, digest)
    try:
        if isinstance(folder, Path):
            arrays = read_group(folder)
        else:
            with TemporaryDirectory() as copy:
                folder.download(Path(copy))
                arrays = read_group(Path(copy))
        book = Codebook.from_arrays(vocab_size, arrays)
        if book.digest == digest:
            return book
        problem = "its content is not what the manifest names"
    except StorageError:
        raise
    except Exception as error:  # zarr raises many kinds
        problem = repr(error)
    raise CorruptError(f"{folder}: the codebook cannot be read ({problem}): restore it or delete the cache")


def _record_path(cache: Place, shard: int) -> Place:
    return cache / "shards" / f"{shard:05}.json"


def _differences(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """Fields in which two identities differ, and a text with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for key in sorted({*old, *new}):
            found |= _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if old == new else {name: f"{name} is {_short(old)} there and {_short(new)} now"}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
