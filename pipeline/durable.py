"""Files that are either whole or absent, also after a crash: write aside, fsync, rename, fsync the directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptError

TEMPORARY = ".tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: tasks that start together all write the manifest, with the same bytes.
    aside = path.with_name(f"{path.name}{TEMPORARY}-{socket.gethostname()}-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by readable JSON; equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def create_json(path: Path, value: Any) -> bool:
    """Write JSON where there is no file yet, in one step; False if another process was first."""
    aside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    write_json(aside, value)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file, None where there is no file. Raises CorruptError, ending in `remedy`, for other bytes."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error}): {remedy}") from error


def publish_directory(aside: Path, path: Path, *, replace: bool = True) -> None:
    """Make everything in `aside` durable, then give the directory its final name.

    A directory that is already there gives way, or stays where `replace` is False.
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            sync_file(Path(folder) / name)
        sync_directory(Path(folder))
    if replace and path.exists():
        shutil.rmtree(path)
    try:
        aside.replace(path)
    except OSError as error:
        if replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(aside)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_directory = sync_file  # fsync of a directory makes the names in it durable


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
