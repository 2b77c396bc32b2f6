"""The processes of one run, numbered in the environment by `torchrun` or `accelerate launch`; a single process is rank
0 of 1."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

# Ranks of stage one end hours apart; the collective that waits for the last one must not time out.
_TIMEOUT = timedelta(days=30)


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Rank of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join() -> None:
    """Initialise torch.distributed, with NCCL where there is CUDA; does nothing in a single process."""
    import torch
    from torch import distributed

    if world_size() > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        distributed.init_process_group(backend, timeout=_TIMEOUT)


def broadcast(value: Any = None) -> Any:
    """The first process's value, in every process; all of them call it."""
    from torch import device, distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0, device=device("cpu"))
    return values[0]


def wait_for_all() -> None:
    """Return once every process has called it."""
    from torch import distributed, zeros

    if world_size() > 1:
        join()
        distributed.all_reduce(zeros(1))  # on the CPU, where waiting does not occupy a GPU
