"""Locks for work that one process at a time may do.

The kernel releases the lock of a process that ends, however it ends. A lock saves work; it does not guard files: every
process stages under a name of its own and publishes in one step (`durable`), so that a file system without locks is
safe too.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, quiet: bool = False) -> Iterator[bool]:
    """Hold the lock of `path`, after those who hold it now: a file beside it, which exists meanwhile.

    Yields whether it is held: False where the file system has no locks. `quiet`: waiting is not logged. Not reentrant.
    """
    file = path.with_name(f"{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(descriptor, path, quiet)
            if held and not _is_still(file, descriptor):
                continue  # the process before has deleted this file, and others may hold the lock of a new one
            try:
                yield held
            finally:
                file.unlink(missing_ok=True)
            return
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor too
            os.close(descriptor)


@contextmanager
def claimed(file: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the lock of a file that names its holder; raises `busy(holder)` where another process holds it.

    The lock of POSIX: forked processes do not share it, so that workers which outlive their parent do not hold it, and
    NFS has it too. Where a file system has none, nothing is locked.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = os.path.realpath(file)
    if path in _claims:  # the lock is the process's own
        raise busy(f"this process ({os.getpid()})")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    _claims.add(path)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, 0)
            job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}{job}, since {since}".encode(), 0)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            raise busy(holder or "another process") from error
        except OSError as error:
            logger.info(f"{file}: not locked, the file system has no locks ({error.strerror})")
        yield
    finally:
        _claims.discard(path)
        os.close(descriptor)


_claims: set[str] = set()
"""The files that this process has claimed."""


def _lock(descriptor: int, path: Path, quiet: bool) -> bool:
    """Lock an open file, once no other process does; False where that cannot be done."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not quiet:
            logger.info(f"{path}: another process is writing it, waiting for it to end")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether an open file has still its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    return False
