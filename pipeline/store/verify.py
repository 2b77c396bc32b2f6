"""Verification of a finished or partial cache, byte by byte, and removal of bad shards."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..base.durable import file_digest, sync
from ..base.errors import CorruptError
from ..base.places import Place
from ..base.processes import cores
from ..base.progress import Meter
from ..corpus.labels import row_bytes
from ..corpus.rows import PackedRows
from ..recipe.paths import CachePaths
from .manifest import Manifest, check_corpus
from .records import read_record
from .shard_reader import ShardReader, read_rows

_ROWS_AT_ONCE = 256
_ROUND_TRIPS = 16
"""Shards of an object store at once, though there are fewer cores: each takes round trips."""
_SHARDS_OF_A_THREAD = 16
"""Queued at once: a cache may have a million."""


def verify(cache: Place) -> dict[int, str]:
    """Check every byte of every committed shard, on all cores. Returns shard -> problem, empty for a good cache.

    The text of its rows must be that of the corpus. Raises IncompleteError, CorruptError or MismatchError for a
    manifest or corpus that cannot be used: no removal of shards repairs that.
    """
    manifest = Manifest.read(cache)
    corpus = PackedRows.of_cache(cache)
    corpus.verify()
    check_corpus(corpus, manifest)

    def problem(shard: int) -> str | None:
        try:
            record = read_record(cache, manifest, shard)
            if record is not None:
                verify_shard(cache, manifest, record)
                if corpus.digest(*manifest.shard_range(shard)) != record["rows_sha256"]:
                    raise CorruptError(
                        f"{corpus.path}: the rows of shard {shard} differ from those that the teacher read"
                    )
        except CorruptError as error:
            return str(error)
        return None

    threads = cores() if isinstance(cache, Path) else max(cores(), _ROUND_TRIPS)
    bad: dict[int, str] = {}
    with Meter(f"verify {cache.name}", manifest.num_shards, "shards") as meter, ThreadPoolExecutor(threads) as pool:
        for first in range(0, manifest.num_shards, _SHARDS_OF_A_THREAD * threads):
            some = range(first, min(first + _SHARDS_OF_A_THREAD * threads, manifest.num_shards))
            for shard, found in zip(some, pool.map(problem, some), strict=True):
                if found is not None:
                    bad[shard] = found
                meter.advance(1)
    return bad


def drop_shard(cache: Place, shard: int) -> None:
    """Remove a shard, its commit record first; `cache` then fills it again."""
    CachePaths(cache).complete.unlink(missing_ok=True)
    CachePaths(cache).record(shard).unlink(missing_ok=True)
    if isinstance(cache, Path):
        sync(CachePaths(cache).shards)
    CachePaths(cache).shard(shard).unlink(missing_ok=True)


def verify_shard(cache: Place, manifest: Manifest, record: dict[str, Any]) -> None:
    """Compare the file of a shard, and the text of its rows, with its commit record.

    Raises CorruptError where it differs.
    """
    file, (start, stop) = CachePaths(cache).shard(record["shard"]), record["rows"]
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.size()
        if size != record["size"]:
            raise CorruptError(f"{file}: {size:,} bytes, the commit record says {record['size']:,}")
        if file_digest(file) != record["sha256"]:
            raise CorruptError(f"{file}: the checksum differs from the commit record")
    except FileNotFoundError as error:
        raise CorruptError(f"{file}: missing") from error
    reader = ShardReader(file, manifest.layout(), manifest.codec.profile, stop - start, record)
    try:
        if _rows_digest(reader, manifest, stop - start) != record["rows_sha256"]:
            raise CorruptError(f"{file}: the text of its rows is not that of its commit record")
    except (ValueError, IndexError) as error:
        raise CorruptError(f"{file}: the text of its rows does not decode ({error})") from error
    finally:
        reader.close()


def _rows_digest(reader: ShardReader, manifest: Manifest, rows: int) -> str:
    """sha256 of the text of a shard's rows (`row_bytes`).

    Raises ValueError or IndexError for what no encoder writes.
    """
    sha, names = hashlib.sha256(), list(manifest.text.layout())
    for first in range(0, rows, _ROWS_AT_ONCE):
        some = [(reader, row) for row in range(first, min(first + _ROWS_AT_ONCE, rows))]
        sha.update(row_bytes(manifest.text.decode(read_rows(some, names))))
    return sha.hexdigest()
