"""What a device does during a job: which kernels it runs and how long, and how much of the time it is busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import wait_for, without_stderr


def kernel_times(job: Callable[[], Any], device: torch.device, shown: int = 12) -> dict[str, Any]:
    """Of one call, after one that warms up: milliseconds, launches, the share of the time in which the device is busy,
    and the kernels that take longest, as [name, calls, microseconds]. On a CPU operators take the place of kernels."""
    job()
    wait_for(device)
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with without_stderr(), profile(activities=activities) as recorded:
        begin = time.perf_counter()
        job()
        wait_for(device)
        seconds = time.perf_counter() - begin
    totals: dict[str, tuple[int, float]] = {}
    for event in recorded.events() or []:
        if ("CUDA" in str(event.device_type)) != gpu or getattr(event, "is_user_annotation", False):
            continue
        calls, taken = totals.get(event.name, (0, 0.0))
        own = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        totals[event.name] = calls + 1, taken + own
    longest = sorted(totals.items(), key=lambda item: -item[1][1])
    return {
        "milliseconds": 1e3 * seconds,
        "launches": sum(calls for calls, _ in totals.values()),
        "busy": min(sum(taken for _, taken in totals.values()) / 1e6 / max(seconds, 1e-9), 1.0),
        "longest": [[name[:80], calls, round(taken, 1)] for name, (calls, taken) in longest[:shown]],
    }
