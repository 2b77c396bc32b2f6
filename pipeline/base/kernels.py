"""Loops that no array library has, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import numba
import torch

F = TypeVar("F", bound=Callable[..., Any])


class Loop:
    """A function that is compiled when first called, which takes seconds, and kept on disk for all processes to come.

    The types of its arguments must always be the same: processes that compile one function for different types at the same
    time can take each other's results. Indices are not checked.
    """

    def __init__(self, function: Callable[..., Any], fused: bool = False) -> None:
        self._function = function
        self._options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"} if fused else False}
        try:
            self._compiled = numba.njit(function, cache=True, **self._options)
        except RuntimeError:  # no place to keep it: neither beside its file nor in the user's cache
            self._compiled = numba.njit(function, **self._options)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._compiled(*arguments)
        except (EOFError, ImportError, OSError, UnpicklingError):  # what was kept is damaged, or the disk is full
            self._compiled = numba.njit(self._function, **self._options)
            return self._compiled(*arguments)

    @property
    def signatures(self) -> list[Any]:
        """Types that it was compiled for."""
        return list(self._compiled.signatures)


def compiled(function: F) -> F:
    return cast(F, Loop(function))


def compiled_fused(function: F) -> F:
    """With products and sums as one operation where the machine has it: last bits then depend on the machine."""
    return cast(F, Loop(function, fused=True))


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
