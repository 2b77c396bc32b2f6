"""Loops that no array library offers, compiled by numba and cached on disk; and where kernels of Triton run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import numba
import torch

from .errors import first_line

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])


class Kernel:
    """A function that numba compiles at its first call, which takes seconds; later processes load it from disk.

    Every call must pass the same argument types: processes that compile one function for different types at the same
    time can load each other's results. Indices are not checked.
    """

    def __init__(self, function: Callable[..., Any], fused: bool = False) -> None:
        self._function = function
        self._options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"} if fused else False}
        try:
            self.dispatcher = numba.njit(function, cache=True, **self._options)
        except RuntimeError:  # neither the folder of the source file nor the user's cache is writable
            self.dispatcher = numba.njit(function, **self._options)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.dispatcher(*arguments)
        except (EOFError, ImportError, OSError, UnpicklingError):  # the cached file is damaged, or the disk is full
            self.dispatcher = numba.njit(self._function, **self._options)
            return self.dispatcher(*arguments)


def compiled(function: F) -> F:
    """Decorator: a `Kernel` whose results are the same on every machine."""
    return cast(F, Kernel(function))


def compiled_fused(function: F) -> F:
    """Decorator: a `Kernel` with fused multiply-add where the CPU has it; the last bits then depend on the machine."""
    return cast(F, Kernel(function, fused=True))


def in_threads(work: Callable[[int, int], None], size: int, piece: int) -> None:
    """Call `work(start, stop)` for consecutive pieces of 0..size, on as many threads as torch uses.

    The threads end with the call, so a forked process lacks none. Raises what `work` raises.
    """
    starts = range(0, size, piece)
    stops = [*starts[1:], size]
    threads = min(torch.get_num_threads(), len(starts))
    if threads < 2:
        list(map(work, starts, stops))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts, stops))


@cache
def triton_runs_on(device: torch.device) -> bool:
    """Whether kernels of Triton run on a device: a GPU of NVIDIA from the generation with bfloat16 on, with Triton 3.7 or
    newer, which torch 2.13 for CUDA installs on Linux. The kernels are tested with no older one, and 3.2 lacks what they
    need: tuples of constants."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    import triton

    recent = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
    return recent and torch.cuda.get_device_capability(device) >= (8, 0) and _triton_launches()


@cache
def _triton_launches() -> bool:
    """Whether Triton can build what launches its kernels: it takes a C compiler and the headers of Python."""
    import triton.runtime

    try:
        _ = triton.runtime.driver.active
    except Exception as error:  # no compiler, no header, no library of the driver
        logger.warning(
            f"Triton cannot launch kernels here ({first_line(error)}): operations of torch take their place, which are "
            "slower; install gcc and the headers of Python (python3-dev)"
        )
        return False
    return True
