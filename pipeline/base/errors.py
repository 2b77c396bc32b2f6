"""Errors that a user can mend, each with the exit code of the command line.

Whatever is raised from here is printed as one line without a traceback; a traceback means a bug in this project.
"""

from __future__ import annotations

import errno
import re


class PipelineError(Exception):
    """Base of every error with a documented exit code. The message says what is wrong, where, and what to do."""

    exit_code = 1


class RecipeError(PipelineError):
    """The recipe, the command line, or the text and models that they name cannot be used (exit 2)."""

    exit_code = 2


class IncompleteError(PipelineError):
    """Something that an earlier step should have written is not there yet; run that step (exit 3)."""

    exit_code = 3


class StorageError(IncompleteError):
    """The disk is full, read-only or not ours: nothing unfinished was committed; make room and run again (exit 3)."""


class CorruptError(PipelineError):
    """Bytes on disk are not the ones that were written (exit 4)."""

    exit_code = 4


class MismatchError(PipelineError):
    """Two things that must belong together do not: cache and teacher, cache and student, cache and recipe (exit 4)."""

    exit_code = 4


class Preempted(BaseException):
    """The scheduler asked this process to stop (SIGTERM or SIGUSR1); run the same command again (exit 75).

    It comes at any statement, so it is no Exception, like KeyboardInterrupt: nobody may take it for an error of that statement.
    """

    exit_code = 75


_STORAGE_ADVICE = {
    errno.ENOSPC: "no space left on the device: free some space and run the same command again",
    errno.EDQUOT: "disk quota exceeded: free some space and run the same command again",
    errno.EACCES: "permission denied: make it accessible to this user or choose another run_dir",
    errno.EPERM: "operation not permitted: make it accessible to this user or choose another run_dir",
    errno.EROFS: "read-only file system: choose another run_dir",
    errno.EIO: "input/output error: the device is failing or was removed",
    errno.ENOTDIR: "a file is where a directory should be: move it away or choose another run_dir",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose another run_dir",
    errno.EOPNOTSUPP: "not supported by the file system, which must have hard links: choose another run_dir",
}


def storage_error(error: BaseException) -> StorageError | None:
    """Return the one-line form of an operating-system error about storage, or None if it is another kind.

    Libraries in Rust (tokenizers, safetensors) have exceptions of their own, which tell the number in their text, as does what
    torch makes of an error in a loader's worker; what is raised while such an error is handled is about storage too.
    """
    number, where = None, "writing"
    if isinstance(error, OSError) and error.errno is not None:
        number, where = error.errno, str(error.filename) if error.filename is not None else where
    elif (found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))) is not None:
        number = int(found[1] or found[2])
    advice = _STORAGE_ADVICE.get(number or 0)
    if re.search(r"iostream error|inline_container\.cc.*unexpected pos", str(error)):
        advice = (
            "the disk is full or failing: free some space and run the same command again"  # torch.save tells no number
        )
    if advice is None:
        inner = error.__cause__ or error.__context__
        return None if inner is None else storage_error(inner)
    return StorageError(f"{where}: {advice}")
