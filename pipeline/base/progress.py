"""Progress of a long job: one line, the same everywhere.

    cache: runs/mine/cache:  42 %  1,376,256 of 3,276,800 tokens  5,120 tokens/s  6:11 left  shard 3 of 7

On a terminal it stands behind a bar, in a notebook it is one output that changes in place, and elsewhere it is logged
every 30 seconds. Bar and log appear at logging level INFO only, which the command line switches on; a notebook shows the
line unless the library's log is set above WARNING.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from .processes import rank

LINE_SECONDS = 30.0
NOTEBOOK_SECONDS = 1.0
console = Console(stderr=False, highlight=False, soft_wrap=True)
"""The console of the command line, which a bar and the lines above it must share."""

logger = logging.getLogger(__name__)


class Meter:
    """Counts units of work towards `total`, and shows rate and time left; a total of None is not known."""

    def __init__(self, title: str, total: int | None, unit: str = "tokens") -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._output: _NotebookLine | None = None
        if rank() != 0:
            return
        if logger.isEnabledFor(logging.WARNING) and _in_notebook():
            self._output = _NotebookLine()
            self._last_line -= NOTEBOOK_SECONDS
        elif logger.isEnabledFor(logging.INFO) and sys.stdout.isatty():
            line = TextColumn(
                "{task.fields[line]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            )
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(20), line, console=console)
            self._task = self._bar.add_task(title, total=total, line="")

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more; `note` ends the line, such as a loss."""
        self._done += amount
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, line=self._line(now, note))
        elif now - self._last_line >= (LINE_SECONDS if self._output is None else NOTEBOOK_SECONDS):
            self._last_line = now
            line = f"{self._title}: {self._line(now, note)}"
            if self._output is None:
                logger.info(line)
            else:
                self._output.show(line)

    def _line(self, now: float, note: str) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        speed = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        if self._total is None:
            parts = [f"{self._done:,} {self._unit}", speed]
        else:
            left = max(self._total - self._done, 0) / max(rate, 1e-9)
            share = 100 * self._done / max(self._total, 1)
            parts = [
                f"{share:.0f} %",
                f"{self._done:,} of {self._total:,} {self._unit}",
                speed,
                f"{duration(left)} left",
            ]
        return "  ".join([*parts, note] if note else parts)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._output is not None:
            self._output.show(f"{self._title}: {self._done:,} {self._unit} in {duration(self.seconds)}")


class _NotebookLine:
    """A line of a notebook's output that is replaced in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str) -> None:
        if self._handle is None:
            from IPython.display import display

            self._handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": line}, raw=True)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose outputs can be replaced."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
