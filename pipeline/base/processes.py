"""The processes of one run, as `torchrun` and `accelerate launch` start and number them in the environment.

Started alone, a process is number 0 of 1.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

# Ranks of stage one end hours apart; a collective that waits for the last must not give up on it.
_PATIENCE = timedelta(days=30)


def launched() -> bool:
    """Whether a launcher started this process, be it one of several or alone."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Number of this process on its machine: the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Bring the processes together, with a backend for every device that is there. Nothing to do for one alone."""
    import torch
    from torch import distributed

    if world_size() > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        distributed.init_process_group(backend, timeout=_PATIENCE)


def send(value: Any) -> None:
    """Give a value to all other processes, which `receive` it."""
    from torch import device, distributed

    distributed.broadcast_object_list([value], src=0, device=device("cpu"))


def receive() -> Any:
    """The value that the first process sends."""
    from torch import device, distributed

    values = [None]
    distributed.broadcast_object_list(values, src=0, device=device("cpu"))
    return values[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    from torch import distributed, zeros

    if world_size() > 1:
        join()
        distributed.all_reduce(zeros(1))  # on the CPU: no GPU is kept spinning by it
