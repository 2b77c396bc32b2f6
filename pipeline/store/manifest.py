"""What a cache says of itself: a manifest, and a commit record for every shard that exists.

    <cache>/manifest.json        format, identity, codec, shard table
    <cache>/codebook-*.zarr/     the codec's table of token ids, if it has one
    <cache>/corpus/              packed rows
    <cache>/shards/00000.zarr/   one Zarr group
    <cache>/shards/00000.json    commit record, written last: rows, size and checksum of every file

What exists is decided by manifest and commit records alone, never by looking at Zarr. Every file is tied to the manifest by
checksums: shards by their records, whose `record_sha256` covers the record itself, the codebook by its digest in the codec,
the corpus by that of its `prepared.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..base.durable import json_digest, read_json
from ..base.errors import CorruptError, IncompleteError, MismatchError, StorageError
from ..base.places import Place
from ..corpus.labels import IntArray, target_mask
from ..corpus.rows import PackedRows
from .codebook import Codebook
from .codec import TargetCodec, check_vocab_size
from .layout import codebook_path
from .shards import CHUNK_CODECS, read_group
from .signals import Signal

FORMAT_VERSION = 3


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

    def target_mask(
        self, labels: np.ndarray[Any, np.dtype[np.int64]], segment_ids: IntArray
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[R, L] bool: positions that have a target."""
        mask: np.ndarray[Any, np.dtype[np.bool_]] = target_mask(labels, segment_ids, self.identity.get("targets_on"))
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


def check_corpus(corpus: PackedRows, manifest: Manifest) -> None:
    there, cached = corpus.meta.get("digest"), manifest.identity["corpus"]
    if there != cached:
        raise MismatchError(
            f"{corpus.path}: other rows (digest {_short(there)}) than were cached (digest {_short(cached)})"
        )
    if (corpus.stamp, corpus.rows, corpus.row_length) != (manifest.prepared, manifest.rows, manifest.row_length):
        raise CorruptError(f"{corpus.path}: not as it was when the cache was begun: delete it and run `prepare` again")


def _read_codebook(cache: Place, codec: dict[str, Any]) -> Codebook | None:
    digest, vocab_size = codec["codebook"], codec["vocab_size"]
    if digest is None:
        return None
    if not (isinstance(digest, str) and digest.isalnum()):
        raise ValueError(f"{digest!r} is not the digest of a codebook")
    check_vocab_size(vocab_size)
    folder = codebook_path(cache, digest)
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


def identity_differences(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """Fields in which two identities differ, and a text with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for key in sorted({*old, *new}):
            found |= identity_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if old == new else {name: f"{name} is {_short(old)} there and {_short(new)} now"}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
