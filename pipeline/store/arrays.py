"""arrays."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]


class Compressed(Protocol):
    """One row of a stored array that is not decompressed yet."""

    def fill(self, out: Array) -> int:
        """Put as many of the first values into `out` as fit. Returns how many there are, or one more than fit."""
        ...


Stored = Array | Compressed
"""One row of a stored array, its values end to end."""
Rows = dict[str, list[Stored]]
"""Array name -> what is stored of each row."""


def joined(name: str, rows: list[Stored], dtype: str, lengths: list[int], whole: bool) -> Array:
    """[n] the first values of each row of an array, so many as `lengths` says, end to end.

    Raises ValueError where a row has fewer, and if it is to be whole, more.
    """
    out, place = np.empty(sum(lengths), dtype), 0
    for stored, length in zip(rows, lengths, strict=True):
        room = out[place : place + length]
        place += length
        if isinstance(stored, np.ndarray):
            room[: len(stored)] = stored[:length]
            _check_length(name, len(stored), length, whole)
        else:
            _check_length(name, stored.fill(room), length, whole)
    return out


def _check_length(name: str, found: int, length: int, whole: bool = False) -> None:
    if found < length or (whole and found > length):
        raise ValueError(f"{name}: another number of values than the positions of a row need")
