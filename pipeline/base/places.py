"""Places: local directories, and URLs of object stores that fsspec opens.

`place("runs/demo")` is a `pathlib.Path`, `place("s3://bucket/run")` a `RemotePath` with the same methods; both join
names by `/`. An object store must only do what all of them do: objects appear at once, ranges of an object can be read,
and a prefix can be listed. It has no rename and no directories, so records that are written last say what exists
(`durable`, `store.writer`).

Failed requests are repeated after growing pauses. Each process opens its own fsspec file system, since connections do
not survive a fork.
"""

from __future__ import annotations

import os
import random
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .errors import PipelineError, RecipeError, StorageError

PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before each repetition of a failed request; a random quarter at most is added."""
NEAR = 2**16
"""Ranges of an object at most this many bytes apart are read by one request."""
_LARGEST_REQUEST = 2**25
_PIECE, _PIECES_AT_ONCE = 2**23, 4
"""Of an object that is read from end to end."""
T = TypeVar("T")


@dataclass(frozen=True)
class RemotePath:
    """An object, or the objects under this prefix, with the methods of `pathlib.Path` that the project uses."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: an object store has no directories."""

    def exists(self) -> bool:
        return bool(self.request("look for", lambda system, path: system.exists(path)))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError where the object does not exist."""
        return bytes(self.request("read", lambda system, path: system.cat_file(path)))

    def read_again(self) -> bytes:
        """The same where an answer seemed damaged: compared with the object's size, at the cost of a request."""

        def read(system: Any, path: str) -> bytes:
            data, size = system.cat_file(path), int(system.size(path))
            if len(data) < size:
                raise OSError(f"an answer of {len(data):,} bytes of {size:,}")
            return bytes(data)

        return self.request("read", read)

    def size(self) -> int:
        """Raises FileNotFoundError where the object does not exist."""
        return int(self.request("look for", lambda system, path: system.size(path)))

    def pieces(self, size: int | None = None) -> Iterator[bytes]:
        """The object, some pieces of 8 MiB at a time; `size` spares a request. Raises FileNotFoundError where it does
        not exist."""
        size = self.size() if size is None else size
        firsts = range(0, size, _PIECE)
        for number in range(0, len(firsts), _PIECES_AT_ONCE):
            some = list(firsts[number : number + _PIECES_AT_ONCE])
            yield from self.request(
                "read", partial(_read_blocks, [self] * len(some), some, [min(at + _PIECE, size) for at in some])
            )

    def write_bytes(self, data: bytes) -> None:
        self.request("write", lambda system, path: system.pipe_file(path, data), writes=True)

    def create_bytes(self, data: bytes) -> bool:
        """Write an object unless it exists; False if it does."""

        def create(system: Any, path: str) -> bool:
            try:
                system.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):
                # This store has no conditional write: two writers within one round trip both write.
                if system.exists(path):
                    return False
                system.pipe_file(path, data)
            return True

        return self.request("write", create, writes=True)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.request("delete", lambda system, path: system.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def upload(self, folder: Path, names: list[str]) -> None:
        """Write these files of a local directory under this prefix, and delete its other objects."""
        extra = set(files_in(self)) - set(names)

        def put(system: Any, path: str) -> None:
            system.put([str(folder / name) for name in names], [f"{path}/{name}" for name in names])

        self.request("write", put, writes=True)
        for name in extra:
            (self / name).unlink(missing_ok=True)

    def upload_file(self, file: Path) -> None:
        """Write this object from a local file."""
        self.request("write", lambda system, path: system.put_file(str(file), path), writes=True)

    def download(self, folder: Path, needed: Callable[[str], bool] = lambda name: True) -> None:
        """Read all objects under this prefix into a local directory, or those whose name is `needed`."""
        sizes = {name: size for name, size in files_in(self).items() if needed(name)}
        for parent in {(folder / name).parent for name in sizes}:
            parent.mkdir(parents=True, exist_ok=True)

        def get(system: Any, path: str) -> None:
            system.get([f"{path}/{name}" for name in sizes], [str(folder / name) for name in sizes])
            for name, size in sizes.items():
                if (folder / name).stat().st_size < size:
                    raise OSError(f"an answer of {(folder / name).stat().st_size:,} bytes of {size:,} for {name}")

        self.request("read", get)

    def request(self, what: str, action: Callable[[Any, str], T], *, writes: bool = False) -> T:
        """Run `action(file system, path)`, again after a pause where it fails; `what` is its verb in messages.

        Raises StorageError after the last attempt. FileNotFoundError passes through, except for a write, where it means
        that the bucket does not exist.
        """
        for pause in (*PAUSES, None):
            try:
                return action(*_system(self.url))
            except PipelineError:
                raise
            except FileNotFoundError as error:
                if not writes:
                    raise
                raise StorageError(f"{self.url}: cannot {what} it, there is no such bucket ({error})") from error
            except PermissionError as error:
                raise StorageError(f"{self.url}: cannot {what} it, permission denied ({error})") from error
            except Exception as error:  # each client library raises its own classes
                if _is_permanent(error):
                    raise StorageError(
                        f"{self.url}: cannot {what} it ({error!r}): mend the request or its rights"
                    ) from error
                if pause is None:
                    raise StorageError(
                        f"{self.url}: cannot {what} it, {len(PAUSES) + 1} attempts failed ({error}): run the same command "
                        "again when the store answers"
                    ) from error
                time.sleep(pause * (1 + random.random() / 4))
        raise AssertionError("unreachable")


_WORTH_ANOTHER_ATTEMPT = (408, 425, 429)
_PERMANENT = (NotImplementedError, ImportError, AttributeError, TypeError, IsADirectoryError, NotADirectoryError)
"""fsspec raises the first where a file system lacks a call; its clients the next three for a package that is missing or too
old, or an option that they do not have."""


def _is_permanent(error: BaseException) -> bool:
    """Whether another attempt would fail as well: the client cannot do it, has no credentials, or HTTP says 4xx.

    Each client library names the HTTP status in its own way: botocore in `response`, aiohttp and gcsfs in `status` or
    `code`, azure in `status_code`. An error may be the cause of another.
    """
    if (
        isinstance(error, _PERMANENT)
        or "Credentials" in type(error).__name__
        or "ProfileNotFound" in type(error).__name__
    ):
        return True
    response = getattr(error, "response", None)
    found = [getattr(error, name, None) for name in ("status", "code", "status_code")]
    if isinstance(response, dict):
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    status = next((value for value in found if isinstance(value, int)), None)
    if status is not None:
        return 400 <= status < 500 and status not in _WORTH_ANOTHER_ATTEMPT
    inner = error.__cause__
    return inner is not None and _is_permanent(inner)


Place = Path | RemotePath


def place(where: str | Path | RemotePath) -> Place:
    """The place that a path or URL names. Raises RecipeError for a URL that no installed package opens."""
    if isinstance(where, (Path, RemotePath)):
        return where
    scheme, sign, rest = where.partition("://")
    if not sign:
        return Path(where)
    if scheme in ("file", "local"):
        return Path(rest)
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        hint = ": pip install 'logit-cache[s3]'" if scheme in ("s3", "s3a") else ""
        raise RecipeError(f"{where}: no package is installed that opens {scheme}:// ({error}){hint}") from error
    return RemotePath(where.rstrip("/"))


def files_in(folder: Place) -> dict[str, int]:
    """Relative name (with "/") -> size in bytes of every file below a directory; empty where it is missing.

    Files that a writer renames or deletes meanwhile may be left out.
    """
    if isinstance(folder, Path):
        sizes = {}
        for parent, _, names in os.walk(folder, onerror=_unless_gone):
            for name in names:
                file = Path(parent, name)
                with suppress(FileNotFoundError):
                    status = file.stat()
                    if stat.S_ISREG(status.st_mode):
                        sizes[file.relative_to(folder).as_posix()] = status.st_size
        return dict(sorted(sizes.items()))
    try:
        path, infos = folder.request("list", lambda system, path: (path, system.find(path, detail=True)))
    except FileNotFoundError:
        return {}
    return {name.removeprefix(f"{path}/"): int(info["size"]) for name, info in sorted(infos.items()) if name != path}


def _unless_gone(error: OSError) -> None:
    """Error handler for os.walk, which by default ignores a failing disk too."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def each_name(folder: Place) -> Iterator[str]:
    """Names of the entries of a directory, one after the other; none where it is missing."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:  # iterdir() would build a Path for each of perhaps very many
                yield from (entry.name for entry in entries)
        else:
            names = folder.request("list", lambda system, path: system.ls(path, detail=False))
            yield from (name.rpartition("/")[2] for name in names)
    except FileNotFoundError:
        return


def names_in(folder: Place) -> set[str]:
    """The same as a set."""
    return set(each_name(folder))


def modified_in(folder: Place) -> dict[str, float]:
    """Name -> modification time (seconds since the epoch) of the files of a directory, as far as the store gives it.

    Empty where the directory is missing. Files that a writer renames or deletes meanwhile may be left out.
    """
    try:
        if isinstance(folder, Path):
            written = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        written[entry.name] = entry.stat().st_mtime
            return written
        infos = folder.request("list", lambda system, path: system.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    times = {info["name"].rpartition("/")[2]: info.get("LastModified", info.get("created")) for info in infos}
    return {name: when.timestamp() for name, when in times.items() if hasattr(when, "timestamp")}


def read_all(files: Sequence[Place]) -> list[bytes | None]:
    """The contents of many files, None for missing ones; remote files are fetched concurrently."""
    remote = [file for file in files if isinstance(file, RemotePath)]
    if not remote:
        return [file.read_bytes() if file.exists() else None for file in files]

    def fetch(system: Any, _: str) -> list[bytes | None]:
        paths = [system._strip_protocol(file.url) for file in remote]
        found = system.cat_ranges(paths, [0] * len(paths), [None] * len(paths), on_error="return")
        for value in found:
            if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                raise value
        return [None if isinstance(value, FileNotFoundError) else value for value in found]

    return remote[0].request("read", fetch)


def read_ranges(files: Sequence[RemotePath], offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Ranges of objects of one store: near ranges by one request, all requests concurrently.

    Raises FileNotFoundError for a missing object.
    """
    from fsspec.utils import merge_offset_ranges

    names = [file.url for file in files]
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    urls, firsts, lasts = merge_offset_ranges(names, list(offsets), ends, max_gap=NEAR, max_block=_LARGEST_REQUEST)
    whole = partial(_read_blocks, [RemotePath(url) for url in urls], firsts, lasts)
    blocks, keys, result = files[0].request("read", whole), list(zip(urls, firsts, strict=True)), []
    for name, start, end in zip(names, offsets, ends, strict=True):
        block = bisect_right(keys, (name, start)) - 1
        result.append(bytes(blocks[block][start - firsts[block] : end - firsts[block]]))
    return result


def _read_blocks(
    files: Sequence[RemotePath], firsts: Sequence[int], lasts: Sequence[int], system: Any, _: str
) -> list[bytes]:
    """One attempt at ranges, a request for each. Raises OSError for an answer that is shorter than what is there."""
    paths = [system._strip_protocol(file.url) for file in files]
    blocks: list[bytes] = system.cat_ranges(paths, list(firsts), list(lasts), on_error="raise")
    for path, first, last, block in zip(paths, firsts, lasts, blocks, strict=True):
        if len(block) < last - first and system.size(path) >= last:
            raise OSError(f"an answer of {len(block):,} bytes where {last - first:,} were asked for")
    return blocks


def _system(url: str) -> tuple[Any, str]:
    """File system and path of a URL. fsspec caches file systems per process."""
    from fsspec.core import url_to_fs

    # No cached listings: stage one writes while others read.
    system, path = url_to_fs(url, use_listings_cache=False)
    return system, str(path)
