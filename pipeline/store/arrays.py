"""Types of stored data: arrays by name, rows of them that may still be compressed, and numbers of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
Rows = dict[str, list[Array]]
"""Array name -> its rows, flat."""
RowShape = tuple[int, ...] | None
"""Shape of one row of an array; None where the longest row of the shard decides its length."""
RowIndices = np.ndarray[Any, np.dtype[np.int64]]
RowLosses = np.ndarray[Any, np.dtype[np.float32]]
"""[rows] nats."""


Compressed = Callable[[Array], int]
"""One row of a stored array, still compressed: decompresses the first values into its argument `out`, and returns their
number, or `len(out) + 1` where the row has more."""
Stored = Array | Compressed
"""One row of a stored array, flat."""
StoredRows = dict[str, list[Stored]]
"""Array name -> the stored rows."""


def flat_rows(arrays: Arrays) -> Rows:
    """The rows of arrays [B, ...]."""
    return {name: list(values.reshape(len(values), -1)) for name, values in arrays.items()}


def joined(name: str, rows: list[Stored], dtype: str, lengths: list[int], whole: bool) -> Array:
    """[sum of lengths] the first `length` values of each row, end to end.

    Raises ValueError where a row has fewer values, and with `whole` where it has more.
    """
    out, place = np.empty(sum(lengths), dtype), 0
    for stored, length in zip(rows, lengths, strict=True):
        room = out[place : place + length]
        place += length
        if isinstance(stored, np.ndarray):
            room[: len(stored)] = stored[:length]
            check_length(name, len(stored), length, whole)
        else:
            check_length(name, stored(room), length, whole)
    return out


def check_length(name: str, values: int, length: int, whole: bool = False) -> None:
    """Raises ValueError where a row has fewer values than `length`, and with `whole` where it has more."""
    if values < length or (whole and values > length):
        raise ValueError(f"{name}: the number of stored values does not fit the positions of the row")
