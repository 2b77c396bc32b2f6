"""Loops that no array library has, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import torch

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile when first called, which takes seconds, and keep the result on disk for all processes to come.

    The types of the arguments must always be the same: processes that compile one function for different types at the same
    time can take each other's results. Indices are not checked.
    """
    try:
        return cast(F, numba.njit(function, nogil=True, cache=True))
    except RuntimeError:  # no place to keep it: neither beside its file nor in the user's cache
        return cast(F, numba.njit(function, nogil=True))


def in_threads(work: Callable[[int, int], None], size: int, piece: int) -> None:
    """Do `work(start, stop)` for pieces of 0..size, by as many threads as torch would take.

    They end with the call, so that none is missing in a forked process.
    """
    pieces = [(start, min(start + piece, size)) for start in range(0, size, piece)]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        for start, stop in pieces:
            work(start, stop)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda ends: work(*ends), pieces):
            pass
