"""Errors that a user can mend, each with its exit code.

The command line prints them as one line; a traceback means a bug.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """Base of every error with a documented exit code. The message says what is wrong, where, and what to do."""

    exit_code = 1


class RecipeError(PipelineError):
    """The recipe, the command line, or the text and models that they name cannot be used (exit 2)."""

    exit_code = 2


class IncompleteError(PipelineError):
    """The output of an earlier step is missing: run that step (exit 3)."""

    exit_code = 3


class StorageError(IncompleteError):
    """The disk is full, read-only or not writable: nothing unfinished was committed, run again after mending it (exit
    3)."""


class CorruptError(PipelineError):
    """Bytes on disk differ from what was written (exit 4)."""

    exit_code = 4


class MismatchError(PipelineError):
    """Two inputs do not belong together: cache and teacher, cache and student, cache and recipe (exit 4)."""

    exit_code = 4


class Preempted(BaseException):
    """The scheduler asked this process to stop (SIGTERM or SIGUSR1): run the same command again (exit 75).

    A signal can interrupt any statement, so this is no Exception, like KeyboardInterrupt: `except Exception` must not
    catch it.
    """

    exit_code = 75


@contextmanager
def recipe_error(where: str) -> Iterator[None]:
    """Turn a ValueError of the library into a RecipeError that begins with `where`, the key or option at fault."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of what another library says of its error; the name of its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


_STORAGE_ADVICE = {
    errno.ENOSPC: "no space left on the device: free some space and run the same command again",
    errno.EDQUOT: "disk quota exceeded: free some space and run the same command again",
    errno.EACCES: "permission denied: make it accessible to this user or choose another directory",
    errno.EPERM: "operation not permitted: make it accessible to this user or choose another directory",
    errno.EROFS: "read-only file system: choose another directory",
    errno.EIO: "input/output error: the device is failing or was removed",
    errno.ENOTDIR: "a file is where a directory should be: move it away or choose another directory",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose another directory",
    errno.EOPNOTSUPP: "not supported by the file system, which must have hard links: choose another directory",
}


def storage_error(error: BaseException) -> StorageError | None:
    """The one-line form of an operating-system error about storage, None for any other error.

    Libraries in Rust (tokenizers, safetensors) and torch (for loader workers) raise their own exceptions with the error
    number in the text. Causes and contexts of an exception count too.
    """
    number, where = None, "writing"
    if isinstance(error, OSError) and error.errno is not None:
        number, where = error.errno, str(error.filename) if error.filename is not None else where
    elif (found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))) is not None:
        number = int(found[1] or found[2])
    advice = _STORAGE_ADVICE.get(number or 0)
    if re.search(r"iostream error|inline_container\.cc.*unexpected pos", str(error)):
        # torch.save gives no number.
        advice = "the disk is full or failing: free some space and run the same command again"
    if advice is None:
        inner = error.__cause__ or error.__context__
        return None if inner is None else storage_error(inner)
    return StorageError(f"{where}: {advice}")
