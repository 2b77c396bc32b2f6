"""Copies of the shards of a remote cache on this machine, within a limit of bytes.

    FOLDER/DIGEST/00000.zarr.zip     the whole file of a shard, as its commit record describes it
    FOLDER/DIGEST/00000.rows         some rows of a shard: a file of its size with holes, which is read as they are
    FOLDER/DIGEST/00000.json         its commit record

All processes of a machine share the folder, for all caches; DIGEST is that of the cache's address and identity. A whole
copy is staged under a random name and renamed. Nothing has to be right in a `.rows` file: readers compare every chunk
with the index and read what is missing from the cache. The copies used longest ago make room for others; who needs a
copy soon says so by its time of modification. What a killed process has staged has no lock, and goes when room is made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..base.durable import TEMPORARY, bytes_digest, read_json, write_json
from ..base.errors import CorruptError
from ..base.lock import locked
from ..base.places import RemotePath
from ..recipe.paths import CachePaths, record_name, shard_stem
from .manifest import Manifest
from .records import check_record

WHOLE, ROWS = ".zarr.zip", ".rows"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class LocalStore:
    """The copies of one cache."""

    folder: Path
    """Of the copies of all caches."""
    limit: int
    """Bytes of all copies together."""
    cache: RemotePath
    manifest: Manifest

    def copies(self, shard: int) -> list[Path]:
        """Where copies of a shard are if there are any, that of the whole first."""
        digest = bytes_digest(f"{self.cache.url} {self.manifest.digest}".encode())[:32]
        return [self.folder / digest / f"{shard_stem(shard)}{kind}" for kind in (WHOLE, ROWS)]

    def record(self, shard: int) -> dict[str, Any] | None:
        """The commit record of a shard that has a copy, else None."""
        file = self.copies(shard)[0].with_name(record_name(shard))
        with suppress(CorruptError):
            found = read_json(file, "delete it")
            return None if found is None else check_record(found, file, self.manifest, shard)
        return None

    def fetch(
        self, record: dict[str, Any], needed: Collection[Path], stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Make a copy of a whole shard, unless there is one; False where no room can be made beside the copies `needed`.

        Two processes do not copy the same shard at the same time. Raises CorruptError for a file that differs from its
        record, StorageError where the cache cannot be read.
        """
        copy, rows = self.copies(record["shard"])
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy, quiet=True):
            if _touch(copy) and copy.stat().st_size == record["size"]:
                return True
            with self._staged(copy, record["size"], needed) as aside:
                if aside is None:
                    return False
                sha, file = hashlib.sha256(), CachePaths(self.cache).shard(record["shard"])
                try:
                    for piece in file.pieces(record["size"]):
                        if stopped():
                            return False
                        sha.update(piece)
                        aside.write(piece)
                    aside.flush()
                except FileNotFoundError as error:
                    raise CorruptError(f"{file}: missing") from error
                except OSError as error:
                    if error.errno in _NO_ROOM:
                        return False
                    raise
                if sha.hexdigest() != record["sha256"]:
                    raise CorruptError(f"{file}: the checksum differs from the commit record")
                write_json(copy.with_name(record_name(record["shard"])), record)
                Path(aside.name).replace(copy)
        rows.unlink(missing_ok=True)
        return True

    def add_rows(self, record: dict[str, Any], ranges: Sequence[tuple[int, bytes]], needed: Collection[Path]) -> bool:
        """Keep parts of a shard's file, (place, bytes); False where no room can be made beside the copies `needed`."""
        rows = self.copies(record["shard"])[1]
        rows.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "room", quiet=True):
            if not self._make_room(sum(len(data) for _, data in ranges), needed):
                return False
        with suppress(OSError):  # a full disk leaves less than all of them
            write_json(rows.with_name(record_name(record["shard"])), record)
            descriptor = os.open(rows, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.truncate(descriptor, record["size"])
                for place, data in ranges:
                    os.pwrite(descriptor, data, place)
            finally:
                os.close(descriptor)
            return True
        return False

    def touch(self, shard: int) -> None:
        """Say that the copies of a shard are needed soon."""
        for copy in self.copies(shard):
            _touch(copy)

    @contextmanager
    def _staged(self, copy: Path, size: int, needed: Collection[Path]) -> Iterator[IO[bytes] | None]:
        """A file of this size to write what becomes `copy`, None where there is no room. It is deleted unless renamed."""
        with locked(self.folder / "room", quiet=True):
            if not self._make_room(size, needed):
                yield None
                return
            aside = tempfile.NamedTemporaryFile(dir=copy.parent, prefix=copy.name, suffix=TEMPORARY, delete=False)  # noqa: SIM115
            with suppress(OSError):  # where the file system has no locks
                fcntl.flock(aside, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.truncate(size)  # others count it
        try:
            yield aside
        finally:
            Path(aside.name).unlink(missing_ok=True)
            with suppress(OSError):
                fcntl.flock(aside, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor too
            aside.close()

    def _make_room(self, size: int, needed: Collection[Path]) -> bool:
        """Delete copies until there is room for `size` more bytes; False where those needed leave too little.

        Room is what the limit leaves, and the disk: a twentieth of it stays free.
        """
        used, copies = 0, []
        for file in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):
                if file.name.endswith(TEMPORARY) and _is_abandoned(file):
                    file.unlink()
                    continue
                if not file.name.endswith((WHOLE, ROWS, TEMPORARY)):
                    continue
                status = file.stat()
                held = status.st_blocks * 512 if file.name.endswith(ROWS) else status.st_size
                used += held
                if not file.name.endswith(TEMPORARY) and file not in needed:
                    copies.append((status.st_mtime, held, file))
        disk = shutil.disk_usage(self.folder)
        lacking = size - min(self.limit - used, disk.free - disk.total // 20)
        if lacking > sum(held for _, held, _ in copies):
            return False
        for _, held, file in sorted(copies):
            if lacking <= 0:
                break
            _remove(file)
            lacking -= held
        return True


def _touch(file: Path) -> bool:
    """Set a file's time of modification; False where there is none."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def _remove(copy: Path) -> None:
    copy.unlink(missing_ok=True)
    stem = copy.name.removesuffix(WHOLE).removesuffix(ROWS)
    if not any(copy.with_name(stem + kind).exists() for kind in (WHOLE, ROWS)):
        copy.with_name(f"{stem}.json").unlink(missing_ok=True)


def _is_abandoned(staged: Path) -> bool:
    """Whether no process has a staged file locked."""
    descriptor = os.open(staged, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
