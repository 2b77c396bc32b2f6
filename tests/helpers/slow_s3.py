"""A server of the S3 protocol for reading: slow, and with answers that fail or are cut, as far as it is told to.

It counts requests and bytes. Objects are files, or bytes that are made when they are asked for.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_PIECE = 2**18
_PAGE = 1000


@dataclass
class SlowS3:
    """`with SlowS3(get, names) as s3`: clients of this process and its children read `s3://bucket/...` from it.

    `get` gives an object by name, None where there is none; `names` are those of listings, by their prefix.
    """

    get: Callable[[str], bytes | Path | None]
    names: Callable[[str], Sequence[str]] = lambda prefix: ()
    latency: float = 0.0
    """Seconds that every answer takes."""
    rate: float = float("inf")
    """Bytes per second of all answers together."""
    fails: float = 0.0
    """Share of the requests for objects that are answered by 503."""
    cuts: float = 0.0
    """Share of those after half of which the connection ends."""
    shortens: float = 0.0
    """Share of those that are whole answers with half of the bytes."""
    counts: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> SlowS3:
        import fsspec

        server = self
        self._lock, self._free, self._random = threading.Lock(), 0.0, random.Random(0)

        class Handler(_Handler):
            s3 = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._patch = pytest.MonkeyPatch()
        settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._http.server_address[1]}"}
        settings |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        settings |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in settings.items():
            self._patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        import fsspec

        self._http.shutdown()
        self._http.server_close()
        self._patch.undo()
        fsspec.filesystem("s3").clear_instance_cache()

    def size(self, name: str) -> int:
        found = self.get(name)
        assert found is not None
        return len(found) if isinstance(found, bytes) else found.stat().st_size

    def chance(self) -> float:
        with self._lock:
            return self._random.random()

    def count(self, kind: str, size: int) -> None:
        with self._lock:
            self.counts[kind] += 1
            self.counts["bytes"] += size

    def wait_for(self, size: int) -> None:
        """Return when this many more bytes may have been sent."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.rate
            until = self._free
        time.sleep(max(until - time.monotonic(), 0))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: SlowS3

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.s3.latency)
        url = urlsplit(self.path)
        _, _, key = unquote(url.path).lstrip("/").partition("/")
        if not key:
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self.s3.count("list", 0)
            self._send(200, _listing(self.s3, query))
            return
        found = self.s3.get(key)
        if found is None:
            self.s3.count("missing", 0)
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>" if body else b"")
            return
        size = self.s3.size(key)
        first, last = 0, size
        wanted = self.headers.get("Range")
        if wanted is not None:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high) + 1, size) if high else size
        if body and self.s3.chance() < self.s3.fails:
            self.s3.count("failed", 0)
            self._send(503, b"<Error><Code>SlowDown</Code><Message>reduce</Message></Error>")
            return
        cut = body and self.s3.chance() < self.s3.cuts
        if body and self.s3.chance() < self.s3.shortens:
            last = first + (last - first) // 2
        self.s3.count("get" if body else "head", last - first if body else 0)
        self.send_response(206 if wanted is not None else 200)
        self.send_header("Content-Length", str(last - first if body else size))
        self.send_header("Content-Range", f"bytes {first}-{last - 1}/{size}")
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Sat, 28 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if not body:
            return
        stop = first + (last - first) // 2 if cut else last
        if isinstance(found, bytes):
            self.s3.wait_for(stop - first)
            self.wfile.write(found[first:stop])
        else:
            with found.open("rb") as file:
                file.seek(first)
                for at in range(first, stop, _PIECE):
                    piece = file.read(min(_PIECE, stop - at))
                    self.s3.wait_for(len(piece))
                    self.wfile.write(piece)
        if cut:
            self.close_connection = True

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        self.wfile.write(data)


def _listing(s3: SlowS3, query: dict[str, str]) -> bytes:
    prefix, place = query.get("prefix", ""), int(query.get("continuation-token", 0))
    found = s3.names(prefix)
    page = found[place : place + int(query.get("max-keys", _PAGE))]
    more = place + len(page) < len(found)
    when = "<LastModified>2026-11-28T00:00:00.000Z</LastModified>"
    entries = "".join(f"<Contents><Key>{name}</Key><Size>{s3.size(name)}</Size>{when}</Contents>" for name in page)
    token = f"<NextContinuationToken>{place + len(page)}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
        f"<Prefix>{prefix}</Prefix><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
        f"{token}{entries}</ListBucketResult>"
    ).encode()


def served(folder: Path) -> dict[str, Any]:
    """The arguments of a `SlowS3` that serves the files of a directory; listings have no sub-directories."""

    def get(name: str) -> Path | None:
        file = folder / name
        return file if file.is_file() else None

    def names(prefix: str) -> list[str]:
        found = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        return [name for name in found if name.startswith(prefix)]

    return {"get": get, "names": names}
