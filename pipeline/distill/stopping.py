"""A training that is told to stop: it ends the step, saves, and says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""With which Slurm and others stop a process."""
_WORKER_SECONDS = 60
"""How long a reading process goes on after a signal that all processes of a job get."""


@dataclass
class StopRequest:
    """Whether this process was told to stop."""

    signal_name: str | None = None

    def __call__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """While entered, the signals that stop a process are noted only. Elsewhere than in the main thread they stay as
    they are."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            request.signal_name = signal.Signals(number).name
        else:  # a process that was forked to read rows, and has not come to `outlive_signals`
            signal.alarm(_WORKER_SECONDS)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """For a process that reads rows (DataLoader's worker_init_fn): go on for a minute, in which the training saves.

    Slurm may signal all processes of a job, and a training whose reader has ended cannot end its step.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(_WORKER_SECONDS))


class StopVotes:
    """The processes of a training agree in which step to stop: the first in whose beginning one of them was told to."""

    def __init__(self, request: StopRequest | None) -> None:
        self._request = request
        self._votes: Tensor | None = None
        """Of all processes; None where there is one."""
        self._copied: torch.cuda.Event | None = None

    def own(self, like: Tensor) -> Tensor:
        """This process's vote [1], to be summed over the processes."""
        return torch.full_like(like[:1], int(self._request is not None and self._request()))

    def take(self, votes: Tensor) -> None:
        """The sum of all votes. It is on its way from a GPU when this returns: reading it at once would stop the GPU."""
        self._votes = votes.to("cpu", non_blocking=True)
        if votes.device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def stop(self) -> bool:
        """Whether to stop after the present step."""
        if self._request is None:
            return False
        if self._votes is None:
            return self._request()
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._votes.sum())


class StopAndSave(TrainerCallback):
    """Ends the training after a step, with a checkpoint."""

    def __init__(self, votes: StopVotes) -> None:
        self._votes = votes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._votes.stop():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
