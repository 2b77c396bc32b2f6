"""Output of the commands: lines, tables, and the log of the library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..base.processes import rank

_LIBRARY = __name__.partition(".")[0]


def show(message: str) -> None:
    """One plain line, from the first of several processes."""
    if rank() == 0:
        from ..base.progress import console

        console.print(message, markup=False)


def show_table(rows: list[dict[str, str]]) -> None:
    """Rows under their keys in columns, never folded to a terminal's width, so that they can be pasted."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], others, strict=True)]
        show("  ".join([line[0].ljust(first), *cells]))


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        show(record.getMessage())


@contextmanager
def shown_log() -> Iterator[None]:
    """Show the library's log from level INFO on as plain lines."""
    logger, handler = logging.getLogger(_LIBRARY), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
