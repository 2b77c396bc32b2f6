"""Files and directories that are either complete or absent, also after a crash.

Locally: write to a staging path, fsync, rename, fsync the parent directory. On an object store each object appears at
once, and a directory is complete once the record that is written last exists.
"""

from __future__ import annotations

import atexit
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import CorruptError
from .lock import locked
from .places import Place, RemotePath, files_in

TEMPORARY = ".tmp"
"""Part of the name of every staging path."""


def staging_path(path: Place) -> Path:
    """A new name under which to write what becomes `path`: a sibling, or for a remote path a local temporary one.

    It is random: neither host nor process number tells processes apart, since containers share both.
    """
    name = secrets.token_hex(8)
    if isinstance(path, RemotePath):
        return _scratch(os.getpid()) / name
    return path.with_name(f"{path.name}{TEMPORARY}-{name}")


def remove_staged(path: Path) -> None:
    """Delete what killed processes have staged for `path`. Only for a process that alone may write it (`locked`)."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY}*"):
        remove_tree(leftover)


@contextmanager
def staging_directory(path: Place, *, alone: bool = False) -> Iterator[Path]:
    """A new directory to fill and publish as `path` (`publish_directory`); it is deleted at the end, unless it was
    published.

    `alone` waits until no other process that says so writes `path`, and deletes what killed ones have left staged.
    """
    with ExitStack() as held:
        if alone and isinstance(path, Path) and held.enter_context(locked(path)):
            remove_staged(path)
        aside = staging_path(path)
        aside.mkdir(parents=True)
        held.callback(remove_tree, aside)
        yield aside


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
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


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
        # Once `path` exists, other processes may delete staging paths of it.
        if not path.exists():
            raise
        return False
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)
    return True


def read_json(path: Place, remedy: str) -> Any:
    """The value of a JSON file, None where there is no file.

    Raises CorruptError, ending in `remedy`, for invalid JSON.
    """
    try:
        try:
            return parse_json(path.read_bytes(), path, remedy)
        except CorruptError:
            if isinstance(path, Path):
                raise
            return parse_json(path.read_again(), path, remedy)  # the answer may have been cut short, not the object
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_json(data: bytes, path: Place, remedy: str) -> Any:
    """The value of JSON text. Raises CorruptError, naming `path` and ending in `remedy`, for invalid JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not valid JSON ({error}): {remedy}") from error


def publish_directory(aside: Path, path: Place, *, replace: bool = True, last: str | None = None) -> None:
    """Make everything in `aside` durable, then rename the directory to `path`.

    An existing directory is replaced, or kept where `replace` is False. A remote directory is complete when this
    returns, or for readers that look for it as soon as the file `last` exists.
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
            sync(Path(folder) / name)
        sync(Path(folder))
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
            continue  # another process has renamed it
    sync(path.parent)
    remove_tree(old)


def publish_file(aside: Path, path: Place) -> None:
    """Make a staged file durable and publish it as `path`, in one step, in place of what is there.

    `aside` stays, so that it can be published again. Raises FileNotFoundError where another process has discarded it.
    """
    if isinstance(path, RemotePath):
        path.upload_file(aside)
        return
    sync(aside)
    link = aside.with_name(f"{aside.name}-link")
    link.unlink(missing_ok=True)
    os.link(aside, link)
    try:
        link.replace(path)
    finally:
        link.unlink(missing_ok=True)
    sync(path.parent)


def local_copy(
    folder: Place, marker: str, check: Callable[[Path, bool], object], needed: Callable[[str], bool], part: str
) -> Path:
    """The directory itself where it is local, else a local copy of its `needed` files that is made once and kept.

    Copies of several parts of one directory have different names of the `part`.

    A copy is valid while its file `marker` equals the remote one and `check(copy, new)` does not raise CorruptError; an
    invalid copy is made again. Copies lie in $LOGIT_CACHE_HOME, by default ~/.cache/logit-cache. Raises
    FileNotFoundError where the marker is missing.
    """
    if isinstance(folder, Path):
        return folder
    marked = (folder / marker).read_bytes()
    stamp = bytes_digest(b"\0".join([folder.url.encode(), part.encode(), marked]))
    home = home_directory()
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
        with staging_directory(target, alone=True) as aside:
            if not target.exists():  # else another process has copied it meanwhile
                folder.download(aside, needed)
                check(aside, True)
                publish_directory(aside, target, replace=False)
    return target


def home_directory() -> Path:
    """Where this library keeps files of its own: $LOGIT_CACHE_HOME, by default ~/.cache/logit-cache."""
    return Path(os.environ.get("LOGIT_CACHE_HOME") or Path.home() / ".cache" / "logit-cache")


def remove_tree(path: Place) -> None:
    """Delete a directory or a file, if it exists."""
    if isinstance(path, RemotePath):
        for name in files_in(path):
            (path / name).unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Place) -> None:
    """Delete a path that another process may still be writing.

    It is renamed first, in one step: the other process publishes all of it or finds nothing (FileNotFoundError), never
    a part.
    """
    if isinstance(path, Path):
        try:
            path = path.rename(staging_path(path))
        except FileNotFoundError:
            return  # published, or deleted by its own process
    remove_tree(path)


def sync(path: Path) -> None:
    """Make the content of a file durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Place) -> str:
    if isinstance(path, RemotePath):
        sha = hashlib.sha256()
        for piece in path.pieces():
            sha.update(piece)
        return sha.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return bytes_digest(canonical.encode())
