"""An S3 server on this machine, on the loopback interface, with one bucket."""

from __future__ import annotations

import logging
import os
from types import TracebackType

import pytest


class S3:
    """`with S3() as s3`: the server runs, and clients of this process and its children talk to it."""

    bucket = "s3://bucket"

    def __enter__(self) -> S3:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server.start()
        self._patch = pytest.MonkeyPatch()
        host, port = self._server.get_host_and_port()
        settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        settings |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in settings.items():
            self._patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            self._patch.delenv(name)
        self.system.mkdir("bucket")
        return self

    @property
    def system(self):  # type: ignore[no-untyped-def]
        import fsspec

        return fsspec.filesystem("s3", use_listings_cache=False)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.stop()
        self._patch.undo()
