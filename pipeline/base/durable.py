"""Files that are either whole or absent, also after a crash.

Locally: write aside, fsync, rename, fsync the directory. On an object store every object appears at once, and a directory
is as whole as the record that is written after it.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import CorruptError
from .places import Place, RemotePath, files_in

TEMPORARY = ".tmp"
"""In the name of everything that is not whole yet; what a killed process leaves of it may be removed."""


def staging_path(path: Place) -> Path:
    """Where this process writes what will be `path`: beside it, or for a remote one in the local temporary directory.

    No two processes have the same, so that those that were told to write the same thing do not write into each other's.
    """
    if isinstance(path, RemotePath):
        return _scratch(os.getpid()) / bytes_digest(path.url.encode())[:16]
    return _aside(path)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{TEMPORARY}-{socket.gethostname()}-{os.getpid()}")


def abandoned(name: str) -> bool:
    """Whether something that is not whole yet was begun by a process of this machine that is no more."""
    host, _, pid = name.rpartition(f"{TEMPORARY}-")[2].rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


@contextmanager
def staging_directory(path: Place) -> Iterator[Path]:
    """Where this process writes a directory before it is published as `path`; nothing of it stays."""
    aside = staging_path(path)
    remove_tree(aside)
    try:
        yield aside
    finally:
        remove_tree(aside)


@lru_cache(maxsize=1)
def _scratch(pid: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="logit-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_bytes(path: Place, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    aside = staging_path(path)
    try:
        _write_and_sync(aside, data)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _write_and_sync(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Place, value: Any) -> None:
    """Replace `path` by readable JSON; equal values give equal bytes."""
    write_bytes(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def create_json(path: Place, value: Any) -> bool:
    """Write JSON where there is no file yet, in one step; False if another process was first."""
    if isinstance(path, RemotePath):
        return path.create_bytes(_json_bytes(value))
    aside = staging_path(path)
    try:
        _write_and_sync(aside, _json_bytes(value))
        os.link(aside, path)
    except (FileExistsError, FileNotFoundError):
        # Where `path` exists, anyone may clear away what others have left beside it.
        if not path.exists():
            raise
        return False
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def read_json(path: Place, remedy: str) -> Any:
    """The value of a JSON file, None where there is no file. Raises CorruptError, ending in `remedy`, for other bytes."""
    try:
        return parse_json(path.read_bytes(), path, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_json(data: bytes, path: Place, remedy: str) -> Any:
    """The value that a JSON file holds. Raises CorruptError, naming `path` and ending in `remedy`, for other bytes."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not valid JSON ({error}): {remedy}") from error


def publish_directory(aside: Path, path: Place, *, replace: bool = True, last: str | None = None) -> None:
    """Make everything in `aside` durable, then give the directory its final name.

    A directory that is already there gives way, or stays where `replace` is False. A remote one is whole when this returns
    or, for readers that look for it first, when the file `last` is there.
    """
    if isinstance(path, RemotePath):
        if last is not None:
            (path / last).unlink(missing_ok=True)
        path.upload(aside, [name for name in files_in(aside) if name != last])
        if last is not None:
            (path / last).write_bytes((aside / last).read_bytes())
        remove_tree(aside)
        return
    for folder, _, names in os.walk(aside):
        for name in names:
            sync_file(Path(folder) / name)
        sync_directory(Path(folder))
    old = aside.with_name(f"{aside.name}-old")
    while True:
        try:
            aside.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not replace:
            remove_tree(aside)
            break
        remove_tree(old)
        try:
            path.rename(old)
        except FileNotFoundError:
            continue  # another process has moved it
    sync_directory(path.parent)
    remove_tree(old)


def local_copy(folder: Place, marker: str, check: Callable[[Path, bool], object]) -> Path:
    """A local directory with the files of this one: itself, or a copy of a remote one that is made once and kept.

    `marker` is the file that decides whether a copy is still good. `check(copy, new)` raises CorruptError for one that is
    not: a new one is then not kept, and one that was kept is made anew. Copies lie in $LOGIT_CACHE_HOME, by default
    ~/.cache/logit-cache. Raises FileNotFoundError where the marker is missing.
    """
    if isinstance(folder, Path):
        return folder
    marked = (folder / marker).read_bytes()
    stamp = bytes_digest(folder.url.encode() + b"\0" + marked)
    home = Path(os.environ.get("LOGIT_CACHE_HOME") or Path.home() / ".cache" / "logit-cache")
    target = home / stamp[:32]
    if target.exists():
        try:
            check(target, False)
            good = (target / marker).read_bytes() == marked
        except (CorruptError, FileNotFoundError):
            good = False
        if not good:
            remove_tree(target)
    if not target.exists():
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=home, suffix=TEMPORARY))
        try:
            folder.download(aside)
            check(aside, True)
            publish_directory(aside, target, replace=False)
        finally:
            remove_tree(aside)
    return target


def remove_tree(path: Place) -> None:
    """Delete a directory or a file, as far as it is there."""
    if isinstance(path, RemotePath):
        for name in files_in(path):
            (path / name).unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Place) -> None:
    """Delete what another process may still be writing.

    Renamed first, in one step: that process publishes all of it, or finds nothing (FileNotFoundError) and never a part.
    """
    if isinstance(path, Path):
        try:
            path = path.rename(_aside(path))
        except FileNotFoundError:
            return  # published, or deleted by its own process
    remove_tree(path)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_directory = sync_file  # fsync of a directory makes the names in it durable


def file_digest(path: Place) -> str:
    if isinstance(path, RemotePath):
        return bytes_digest(path.read_bytes())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return bytes_digest(canonical.encode())
