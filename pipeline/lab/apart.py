"""Pieces of work in a process of their own, one after another, each of which may fail in any way.

A kernel that reads outside its memory costs its process the GPU, and one that never ends holds it: a process in which a
piece failed, died or took too long is ended, and the next piece begins in another.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..base.errors import first_line

Pieces = Callable[[str], dict[str, Any]]
"""Runs the piece of work of a name."""


class Apart:
    """Runs pieces of work by name. Leaving the block ends the process."""

    def __init__(self, prepare: Callable[[], Pieces]) -> None:
        """`prepare`, which is pickled, gives in each process what runs a piece there."""
        self._prepare = prepare
        self._running: tuple[BaseProcess, Connection] | None = None

    def __enter__(self) -> Apart:
        return self

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The result of a piece, or why there is none as its `error`."""
        if self._running is None:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            started: BaseProcess = context.Process(target=_serve, args=(self._prepare, there))
            started.start()
            there.close()
            self._running = started, here
        process, connection = self._running
        connection.send(name)
        try:
            found: dict[str, Any] = (
                connection.recv() if connection.poll(seconds) else {"error": f"no end after {seconds:.0f} s"}
            )
        except EOFError:
            process.join()
            found = {"error": f"its process ended with exit code {process.exitcode}"}
        if "error" in found:
            self._end()
        return found

    def _end(self) -> None:
        if self._running is not None:
            process, connection = self._running
            self._running = None
            connection.close()
            process.kill()
            process.join()

    def __exit__(self, *_: object) -> None:
        self._end()


def _serve(prepare: Callable[[], Pieces], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process
    run = prepare()
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            found = run(name)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}", "trace": traceback.format_exc()[-2000:]}
        connection.send(found)
