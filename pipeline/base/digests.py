"""Digests of large files, computed once: other processes and later commands take what the first one has found.

Every process of a run needs the digest of the teacher's weights, which takes minutes for a large teacher.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from .durable import bytes_digest, file_digest, home_directory, read_json, write_json
from .errors import CorruptError
from .lock import locked

_SETTLED_NS = 2_000_000_000
"""A file that has changed within this time may change again without another time stamp: its digest is not kept."""
_LARGE = 2**24
"""Bytes from which on a note is quicker than the file."""
_THREADS = 4


def known_digests(files: Sequence[Path]) -> list[str]:
    """sha256 of local files, as `file_digest`, from notes of earlier calls where the files have not changed since.

    A note holds while inode, size, and the times at which content and entry last changed are those of the file that was
    read. A program can set the former time but not the latter. Notes of large files lie in $LOGIT_CACHE_HOME, by default
    ~/.cache/logit-cache. Of several processes that need a digest at once, one reads the file.
    """
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(_known_digest, files))


def _known_digest(file: Path) -> str:
    if file.stat().st_size < _LARGE:
        return file_digest(file)
    note = home_directory() / "digests" / f"{bytes_digest(str(file.resolve()).encode())[:32]}.json"
    with ExitStack() as stack:
        with suppress(OSError):  # without the lock, each process reads the file
            stack.enter_context(locked(note, quiet=True))
        stamp = _stamp(file)
        with suppress(CorruptError, OSError):
            found = read_json(note, "it is made again")
            if isinstance(found, dict) and found.get("stamp") == stamp and isinstance(found.get("sha256"), str):
                return str(found["sha256"])
        begin = time.time_ns()
        digest = file_digest(file)
        if _stamp(file) == stamp and begin - max(stamp[2:]) > _SETTLED_NS:
            with suppress(OSError):  # the digest serves without its note
                write_json(note, {"file": str(file.resolve()), "stamp": stamp, "sha256": digest})
    return digest


def _stamp(file: Path) -> list[int]:
    about = file.stat()
    return [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
