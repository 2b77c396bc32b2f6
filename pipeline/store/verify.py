"""verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.durable import (
    file_digest,
    remove_tree,
    sync_directory,
)
from ..base.errors import CorruptError
from ..base.places import Place, files_in
from ..base.progress import Meter
from ..corpus.rows import PackedRows, verify_corpus
from .layout import record_path, shard_path
from .manifest import Manifest, check_corpus
from .records import read_record
from .shards import chunk_checksums


def verify(cache: Place) -> dict[int, str]:
    """Check every byte of every committed shard. Returns what is wrong, by shard; empty if all is well.

    Raises IncompleteError, CorruptError or MismatchError where manifest or corpus cannot be used at all: there is no shard
    to be dropped for that.
    """
    manifest = Manifest.read(cache)
    verify_corpus(cache / "corpus")
    corpus = PackedRows(cache / "corpus")
    check_corpus(corpus, manifest)
    bad: dict[int, str] = {}
    with Meter(f"verify {cache.name}", manifest.num_shards, "shards") as meter:
        for shard in range(manifest.num_shards):
            try:
                record = read_record(cache, manifest, shard)
                if record is not None:
                    _verify_files(shard_path(cache, shard), record)
                    if corpus.digest(*manifest.shard_range(shard)) != record["rows_sha256"]:
                        raise CorruptError(
                            f"{cache / 'corpus'}: rows of shard {shard} are not those that the teacher saw"
                        )
            except CorruptError as error:
                bad[shard] = str(error)
            meter.advance(1)
    return bad


def drop_shard(cache: Place, shard: int) -> None:
    """Un-commit a shard, so that `cache` fills it again."""
    record_path(cache, shard).unlink(missing_ok=True)
    if isinstance(cache, Path):
        sync_directory(cache / "shards")
    remove_tree(shard_path(cache, shard))


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
