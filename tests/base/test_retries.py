"""Which failed requests are repeated: what another attempt may mend, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from logit_cache.base import places as storage
from logit_cache.base.errors import StorageError
from logit_cache.base.places import RemotePath, read_ranges


class HttpError(Exception):
    """As aiohttp and gcsfs have it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class ClientError(Exception):
    """As botocore has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"An error occurred ({status})")
        self.response = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}


class NoCredentialsError(Exception):
    """By name, as botocore has it."""


def caused_by(error: Exception) -> OSError:
    """As s3fs translates an error."""
    translated = OSError(22, str(error))
    translated.__cause__ = error
    return translated


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], int]:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    def count(error: Exception) -> int:
        calls: list[str] = []

        def action(_: Any, path: str) -> None:
            calls.append(path)
            raise error

        with pytest.raises(StorageError, match="memory://some/file: cannot read it"):
            RemotePath("memory://some/file").request("read", action)
        return len(calls)

    return count


@pytest.mark.parametrize("kind", [HttpError, ClientError, lambda status: caused_by(ClientError(status))])
@pytest.mark.parametrize(
    ("status", "expected"), [(500, 8), (502, 8), (503, 8), (504, 8), (429, 8), (408, 8), (400, 1), (401, 1), (416, 1)]
)
def test_by_http_status(
    attempts: Callable[[Exception], int], kind: Callable[[int], Exception], status: int, expected: int
) -> None:
    assert attempts(kind(status)) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), 8),
        (ConnectionResetError("peer"), 8),
        (OSError("503 slow down"), 8),
        (NoCredentialsError("Unable to locate credentials"), 1),
        (NotImplementedError("no such call"), 1),
        (PermissionError("denied"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_by_kind(attempts: Callable[[Exception], int], error: Exception, expected: int) -> None:
    assert attempts(error) == expected


def test_an_answer_that_is_cut_is_asked_for_again_an_object_that_is_cut_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    file = RemotePath("memory://cut/file")
    file.write_bytes(bytes(range(200)))
    system, _ = storage._system(file.url)
    real, calls = system.cat_ranges, []

    def cut(paths: list[str], starts: list[int], ends: list[int], **kwargs: Any) -> list[bytes]:
        calls.append(paths)
        found = real(paths, starts, ends, **kwargs)
        return [data[: len(data) // 2] for data in found] if len(calls) < 3 else found

    monkeypatch.setattr(system, "cat_ranges", cut)
    assert read_ranges([file], [10], [50]) == [bytes(range(10, 60))]
    assert len(calls) == 3
    assert read_ranges([file], [150], [100]) == [bytes(range(150, 200))], "there is no more"
    assert len(calls) == 4
    monkeypatch.setattr(storage, "_PIECE", 64)
    assert b"".join(file.pieces()) == b"".join(file.pieces(200)) == bytes(range(200))
