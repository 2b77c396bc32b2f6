"""Time and memory of jobs: in turns, so that a drift of the machine favours none, and peaks of tensor memory."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

_LAUNCHING = 20_000_000
"""Cycles of a GPU, some 10 ms, in which the host launches a few hundred kernels."""


def in_turns(
    jobs: dict[str, Callable[[], Any]], rounds: int, timer: Callable[[Callable[[], Any]], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of every job, one run per round, after a round of warm-up.

    By default by the clock of the host, for which a job must return when its work is done. Every other round runs
    backwards, against a drift of the machine's speed.
    """
    timer = seconds_of if timer is None else timer
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name in list(jobs)[:: 1 if number % 2 else -1]:
            taken = timer(jobs[name])
            if number:
                seconds[name].append(taken)
    return seconds


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def peak_bytes(job: Callable[[], Any], device: torch.device) -> float:
    """Largest size of all tensors during a job, beyond those that exist before it, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        job()
    # Allocations and releases of the CPU's allocator, in order.
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return float(np.cumsum([0, *(event.nbytes() for event in changes)]).max())


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Hide the two lines that the profiler's library writes at every start, at any log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def wait_for(device: torch.device) -> None:
    """Return when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(job: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def device_seconds(job: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a device works on a job, however long the host takes to launch it: on a GPU by its own events, with
    a kernel before them that waits until all is launched; on a CPU those of the host."""
    if device.type != "cuda":
        return seconds_of(job)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_LAUNCHING)  # type: ignore[no-untyped-call]
    begin.record()
    job()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))
