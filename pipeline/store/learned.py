"""What a cache learned before its first shard, codebook and tail basis: Zarr groups with their digest in the name.

They are published before the manifest that names them, so that a manifest always finds them. A group that exists has
the content of its name, and may be in use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from ..base.durable import publish_directory, staging_directory
from ..base.errors import CorruptError, StorageError
from ..base.places import Place
from .arrays import Arrays
from .groups import read_group, write_group


class Learned(Protocol):
    """A value that is stored as arrays, and named by the digest of them."""

    @property
    def digest(self) -> str: ...

    def arrays(self) -> Arrays: ...


L = TypeVar("L", bound=Learned)


def publish_learned(folder: Place, value: Learned) -> None:
    """Write a value to its folder, unless it is there."""
    with staging_directory(folder) as aside:
        write_group(aside, value.arrays())
        publish_directory(aside, folder, replace=False)


def read_learned(folder: Place, digest: str, what: str, decode: Callable[[Arrays], L]) -> L:
    """The value of a folder; `what` is its name in messages.

    Raises CorruptError for a missing folder, arrays that cannot be read, and a value of another digest.
    """
    try:
        if isinstance(folder, Path):
            value = decode(read_group(folder))
        else:
            with TemporaryDirectory() as copy:
                folder.download(Path(copy))
                value = decode(read_group(Path(copy)))
        if value.digest == digest:
            return value
        problem = "its digest is not that of the manifest"
    except StorageError:
        raise
    except Exception as error:  # zarr raises many types
        problem = repr(error)
    raise CorruptError(f"{folder}: the {what} cannot be read ({problem}): restore it or delete the cache")
