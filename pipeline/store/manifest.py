"""The manifest: the identity of a cache, its codec, and the division of its rows into shards.

The manifest and the commit records alone decide what exists in a cache (`recipe.paths.CachePaths` has its files).
Checksums tie every file to the manifest: the record of a shard has those of its file, and `record_sha256` that of the
record itself; the codec has the digests of codebook and tail basis; `prepared_sha256` is the digest of the corpus's
`prepared.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..base.durable import json_digest, read_json
from ..base.errors import CorruptError, IncompleteError, MismatchError
from ..base.places import Place
from ..corpus.labels import COLUMNS, IntArray, target_mask
from ..corpus.rows import Int64Array, PackedRows, Prepared
from ..recipe.paths import CachePaths
from ..targets.basis import TailBasis
from .arrays import RowShape
from .basis_file import read_basis
from .chunks import CHUNK_CODECS
from .codebook import Codebook
from .codec import TargetCodec, check_vocab_size
from .learned import read_learned
from .signals import Signal
from .text import TextCodec

FORMAT_VERSION = 4


@dataclass(frozen=True)
class Manifest:
    """Everything that determines the content of a cache, and the division of its rows into shards."""

    identity: dict[str, Any]
    codec: TargetCodec
    rows: int
    row_length: int
    shard_rows: int
    prepared: str
    """Digest of the corpus with all its files, the tokenizer included."""
    signals: tuple[Signal, ...] = ()
    """The signals beside the targets."""

    @property
    def objective(self) -> str:
        """causal or masked."""
        return str(self.identity["objective"])

    @cached_property
    def text(self) -> TextCodec:
        """The stored form of the rows' text."""
        codec = self.codec
        return TextCodec(self.identity["columns"], self.row_length, codec.vocab_size, codec.profile, codec.codebook)

    def layout(self) -> dict[str, str]:
        """Name -> dtype of the arrays of a shard, in the order in which those of a row lie in its file.

        The largest ones are at the ends, so that those between them are read by one request.
        """
        signals = [layout for signal in self.signals for layout in signal.layout().items()]
        return self.codec.layout() | self.text.layout() | dict(signals)

    def shapes(self) -> dict[str, RowShape]:
        """Name -> shape of a row of each of them."""
        length = self.row_length
        signals = [shape for signal in self.signals for shape in signal.shapes(length).items()]
        return self.codec.shapes(length) | self.text.shapes() | dict(signals)

    def target_mask(self, labels: Int64Array, segment_ids: IntArray) -> Any:
        """[B, L] bool: the positions with a target."""
        return target_mask(labels, segment_ids, self.identity.get("targets_on"))

    @cached_property
    def digest(self) -> str:
        """The identity as one digest; every commit record is compared with it."""
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
        }

    @classmethod
    def read(cls, cache: Place) -> Manifest:
        """The manifest of a cache.

        Raises IncompleteError where there is none, MismatchError for another format version, CorruptError for a
        manifest that contradicts itself or does not fit its codebook or tail basis.
        """
        file = CachePaths(cache).manifest
        value = read_json(file, "restore it or delete the cache")
        if value is None:
            raise IncompleteError(f"{cache}: no cache here ({_what_is_missing(cache)}")
        try:
            version = value["format_version"]
            if version != FORMAT_VERSION:
                older = type(version) is int and version < FORMAT_VERSION
                remedy = "cache again, or read it with the program that wrote it" if older else "upgrade this program"
                raise MismatchError(f"{file}: format version {version}, this program reads {FORMAT_VERSION}: {remedy}")
            if value["chunk_codecs"] != CHUNK_CODECS.get(value["codec"]["profile"]):
                raise MismatchError(
                    f"{file}: chunk codecs {value['chunk_codecs']} are unknown to this program: upgrade it"
                )
            layout, identity = value["layout"], value["identity"]
            rows, row_length, shard_rows = (layout[name] for name in ("rows", "row_length", "shard_rows"))
            if not all(type(number) is int and number >= 0 for number in (rows, row_length, shard_rows)):
                raise ValueError("its layout has values that are no numbers")
            if shard_rows < 1 or rows >= 2**63:
                raise ValueError("its rows make no shards")
            if not all(type(text) is str for text in (identity["objective"], identity["teacher"]["tokenizer"])):
                raise ValueError("its identity names no objective or no tokenizer")
            if identity["columns"] not in COLUMNS:
                raise ValueError("its identity names columns that no corpus has")
            learned = _read_codebook(cache, value["codec"]), _read_tail_basis(cache, value["codec"])
            codec = TargetCodec.from_json(value["codec"], *learned)
            signals = tuple(Signal.from_json(signal) for signal in identity["signals"][1:])
            manifest = cls(identity, codec, rows, row_length, shard_rows, value["prepared_sha256"], signals)
            named = ["targets", *(signal.to_json() for signal in signals)]
            described = [identity[name] for name in ("codec", "row_length", "shard_rows", "signals")]
            consistent = manifest.to_json() == value and described == [value["codec"], row_length, shard_rows, named]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptError(f"{file}: not a manifest ({error!r}): restore it or delete the cache") from error
        if not consistent:
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
        """A new cache. `seed` counts for supports with samples only, `targets_on` for masked rows only."""
        identity = {
            "format_version": FORMAT_VERSION,
            "teacher": teacher,
            "corpus": corpus.meta["digest"],
            "row_length": corpus.row_length,
            "objective": corpus.objective,
            "columns": corpus.column_names,
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
        if corpus.row_start:
            identity["row_start"] = corpus.row_start
        return cls(identity, codec, corpus.rows, corpus.row_length, shard_rows, corpus.stamp, signals)

    def with_codec(self, codec: TargetCodec) -> Manifest:
        """The same cache with a fitted codec."""
        return replace(self, codec=codec, identity={**self.identity, "codec": codec.to_json()})


def _what_is_missing(cache: Place) -> str:
    """The rest of the message for a place without a manifest: why there is none, and what to do."""
    inside = CachePaths(cache / "cache").manifest
    why = f"{inside.name} is missing"
    if isinstance(cache, Path) and not cache.is_dir():
        why = "it is a file" if cache.exists() else "no such directory"
    return f"{why}): " + (f"that of this run is {inside.parent}" if inside.exists() else "run `logit-cache cache`")


def check_corpus(corpus: Prepared, manifest: Manifest) -> None:
    """Raises MismatchError for other rows than the cached ones, CorruptError for any other change of the corpus."""
    found, cached = corpus.meta.get("digest"), manifest.identity["corpus"]
    if found != cached:
        raise MismatchError(
            f"{corpus.path}: the rows (digest {_short(found)}) are not the cached rows (digest {_short(cached)})"
        )
    if (corpus.stamp, corpus.rows, corpus.row_length) != (manifest.prepared, manifest.rows, manifest.row_length):
        raise CorruptError(f"{corpus.path}: changed since the cache was begun: delete it and run `prepare` again")


def _read_codebook(cache: Place, codec: dict[str, Any]) -> Codebook | None:
    digest, vocab_size = codec["codebook"], codec["vocab_size"]
    if digest is None:
        return None
    if not (isinstance(digest, str) and digest.isalnum()):
        raise ValueError(f"{digest!r} is not the digest of a codebook")
    check_vocab_size(vocab_size)
    folder = CachePaths(cache).codebook(digest)
    return read_learned(folder, digest, "codebook", partial(Codebook.from_arrays, vocab_size))


def _read_tail_basis(cache: Place, codec: dict[str, Any]) -> TailBasis | None:
    coordinates = codec["coordinates"]
    if coordinates is None or coordinates["basis"] is None:
        return None
    return read_basis(str(cache), str(coordinates["basis"]))


def identity_differences(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """Field -> a text with both values, for every field in which two identities differ."""
    if isinstance(old, dict | None) and isinstance(new, dict | None) and old != new:
        old, new = old or {}, new or {}
        differences: dict[str, str] = {}
        for key in sorted({*old, *new}):
            differences |= identity_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return differences
    return {} if old == new else {name: f"{name} is {_short(old)} in the cache and {_short(new)} now"}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
