"""Verification of a finished or partial cache, byte by byte, and removal of bad shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.durable import file_digest, remove_tree, sync
from ..base.errors import CorruptError
from ..base.places import Place, files_in
from ..base.progress import Meter
from ..corpus.rows import PackedRows
from ..recipe.paths import CachePaths
from .manifest import Manifest, check_corpus
from .records import read_record
from .shards import chunk_checksums


def verify(cache: Place) -> dict[int, str]:
    """Check every byte of every committed shard. Returns shard -> problem, empty for a good cache.

    Raises IncompleteError, CorruptError or MismatchError for a manifest or corpus that cannot be used: no removal of
    shards repairs that.
    """
    manifest = Manifest.read(cache)
    corpus = PackedRows.of_cache(cache)
    corpus.verify()
    check_corpus(corpus, manifest)
    bad: dict[int, str] = {}
    with Meter(f"verify {cache.name}", manifest.num_shards, "shards") as meter:
        for shard in range(manifest.num_shards):
            try:
                record = read_record(cache, manifest, shard)
                if record is not None:
                    verify_files(CachePaths(cache).shard(shard), record)
                    if corpus.digest(*manifest.shard_range(shard)) != record["rows_sha256"]:
                        raise CorruptError(
                            f"{corpus.path}: the rows of shard {shard} differ from those that the teacher read"
                        )
            except CorruptError as error:
                bad[shard] = str(error)
            meter.advance(1)
    return bad


def drop_shard(cache: Place, shard: int) -> None:
    """Remove a shard, its commit record first; `cache` then fills it again."""
    CachePaths(cache).record(shard).unlink(missing_ok=True)
    if isinstance(cache, Path):
        sync(CachePaths(cache).shards)
    remove_tree(CachePaths(cache).shard(shard))


def verify_files(folder: Place, record: dict[str, Any]) -> None:
    """Compare the files of a shard with its commit record. Raises CorruptError naming the first file that differs."""
    sizes = files_in(folder)
    for name, expected in record["files"].items():
        file = folder / name
        if name not in sizes:
            raise CorruptError(f"{file}: missing")
        if sizes[name] != expected["size"]:
            raise CorruptError(f"{file}: {sizes[name]:,} bytes, the commit record says {expected['size']:,}")
        if file_digest(file) != expected["sha256"]:
            raise CorruptError(f"{file}: the checksum differs from the commit record")
        start, stop = record["rows"]
        if "/c/" in name and chunk_checksums(file.read_bytes(), stop - start) != expected.get("crc32c"):
            raise CorruptError(f"{file}: the checksums of its chunks differ from the commit record")
    extra = set(sizes) - set(record["files"])
    if extra:
        raise CorruptError(f"{folder}: files without a commit record: {', '.join(sorted(extra))}")
