"""Commit records: the JSON files that decide which shards of a cache exist."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.durable import json_digest, parse_json, read_json, write_json
from ..base.errors import CorruptError
from ..base.places import Place, RemotePath, each_name, read_all
from ..recipe.paths import CachePaths, recorded_shard
from .manifest import Manifest

_REPAIR = "run `logit-cache verify --repair`"
_RECORDS_AT_ONCE = 1024


class Records(Mapping[int, dict[str, Any]]):
    """The commit records of a cache by shard; each is read and checked on access.

    A cache may have a million, and a reader needs only those of the shards that it opens. One listing finds them; on an
    object store that takes a request per thousand names, and a finished cache has a note that spares it (`mark`).
    """

    def __init__(self, cache: Place, manifest: Manifest) -> None:
        self._cache, self._manifest = cache, manifest
        every = range(manifest.num_shards)
        self._shards: Collection[int] = every
        if isinstance(cache, Path) or not self._marked():
            # By the names that there are: a hostile manifest may speak of any number of shards.
            found = map(recorded_shard, each_name(CachePaths(cache).shards))
            committed = np.fromiter((shard for shard in found if shard is not None and shard in every), np.int64)
            if len(committed) < len(every):
                self._shards = dict.fromkeys(np.sort(committed).tolist())

    def mark(self) -> None:
        """Note in a cache on an object store that every shard is committed, if it is so."""
        remote = isinstance(self._cache, RemotePath)
        if remote and len(self) == self._manifest.num_shards and not self._marked():
            write_json(CachePaths(self._cache).complete, self._note)

    @property
    def _note(self) -> dict[str, Any]:
        return {"identity_digest": self._manifest.digest, "shards": self._manifest.num_shards}

    def _marked(self) -> bool:
        return bool(read_json(CachePaths(self._cache).complete, "delete it") == self._note)

    def __getitem__(self, shard: int) -> dict[str, Any]:
        """Raises KeyError for a shard that is not committed, CorruptError for a damaged or deleted record."""
        return self.several([shard])[shard]

    def several(self, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Records by shard, read together. Raises as `[]` does."""
        for shard in shards:
            if shard not in self:
                raise KeyError(shard)
        files = [CachePaths(self._cache).record(shard) for shard in shards]
        return {
            shard: self._parsed(shard, file, data)
            for shard, file, data in zip(shards, files, read_all(files), strict=True)
        }

    def all(self) -> Iterator[dict[str, Any]]:
        """All records in order of their shards, read many at a time. Raises as `[]` does."""
        everything = list(self)
        for first in range(0, len(self), _RECORDS_AT_ONCE):
            yield from self.several(everything[first : first + _RECORDS_AT_ONCE]).values()

    def _parsed(self, shard: int, file: Place, data: bytes | None) -> dict[str, Any]:
        if data is None:
            raise CorruptError(f"{file}: the record was deleted: {_REPAIR}")
        try:
            return check_record(parse_json(data, file, _REPAIR), file, self._manifest, shard)
        except CorruptError:
            if isinstance(file, Path):
                raise
            again = parse_json(file.read_again(), file, _REPAIR)  # the answer may have been damaged on its way
            return check_record(again, file, self._manifest, shard)

    def __contains__(self, shard: object) -> bool:
        return shard in self._shards

    def __iter__(self) -> Iterator[int]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def read_record(cache: Place, manifest: Manifest, shard: int) -> dict[str, Any] | None:
    """The commit record of a shard, None where it is not committed. Raises CorruptError for a damaged record."""
    file = CachePaths(cache).record(shard)
    value = read_json(file, _REPAIR)
    return None if value is None else check_record(value, file, manifest, shard)


def check_record(record: dict[str, Any], file: Place, manifest: Manifest, shard: int) -> dict[str, Any]:
    try:
        if record["shard"] != shard or tuple(record["rows"]) != manifest.shard_range(shard):
            raise CorruptError(f"{file}: this is the record of another shard: {_REPAIR}")
        if record["identity_digest"] != manifest.digest:
            raise CorruptError(f"{file}: this record belongs to another cache: {_REPAIR}")
        content = {key: value for key, value in record.items() if key != "record_sha256"}
        if json_digest(content) != record["record_sha256"]:
            raise CorruptError(f"{file}: the record differs from its own checksum: {_REPAIR}")
        index = record["index"]
        if not all(type(digest) is str for digest in (record["sha256"], index["sha256"])):
            raise CorruptError(f"{file}: the record lacks digests: {_REPAIR}")
        sizes = record["size"], index["offset"], index["length"]
        if any(type(size) is not int or not 0 <= size < 2**63 for size in sizes) or sum(sizes[1:]) > sizes[0]:
            raise CorruptError(f"{file}: its sizes fit no file of a shard: {_REPAIR}")
        counts = record["positions"], record["labels"]
        if any(type(count) is not int for count in counts) or not math.isfinite(record["teacher_nats"]):
            raise CorruptError(f"{file}: the sums of the record are not numbers: {_REPAIR}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{file}: not a commit record ({error!r}): {_REPAIR}") from error
    return record
