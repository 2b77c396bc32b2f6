"""Progress of a long job: a bar on a terminal, a logged line every 30 seconds elsewhere.

Both appear at logging level INFO only, which the command line switches on.
"""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .processes import rank

LINE_SECONDS = 30.0
console = Console(stderr=False, highlight=False, soft_wrap=True)
"""The console of the command line, which a bar and the lines above it must share."""

logger = logging.getLogger(__name__)


class Meter:
    """Counts units of work towards `total`, and shows rate and time left."""

    def __init__(self, title: str, total: int, unit: str = "tokens") -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if logger.isEnabledFor(logging.INFO) and sys.stdout.isatty() and rank() == 0:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}  {task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, rate="", note="")

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        speed = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=speed, note=note)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (self._total - self._done) / max(rate, 1e-9)
            extra = f"  {note}" if note else ""
            logger.info(
                f"{self._title}: {100 * self._done / max(self._total, 1):.0f} %  {self._done:,} of {self._total:,} "
                f"{self._unit}  {speed}  {duration(left)} left{extra}"
            )

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


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
