"""The sections of the check of a GPU, as the process that runs them has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..base.kernels import triton_runs_on
from .gpu_check_capture import check_reduction, check_stage_one
from .gpu_check_correct import check_losses, check_supports
from .gpu_check_inputs import DRY, REAL, Inputs, Sizes
from .gpu_check_step import check_step
from .timing import in_turns, wait_for


class Sections:
    """Runs each section by its name, on the GPU if there is one. A model's inputs serve both of its sections."""

    def __init__(self, folder: Path) -> None:
        gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self._sizes, self._folder = REAL if gpu else DRY, folder
        self._inputs: Inputs | None = None

    def __call__(self, name: str) -> dict[str, Any]:
        sizes, device = self._sizes, self._device
        checks = {"machine": _machine, "supports": check_supports, "losses": check_losses, "reduction": check_reduction}
        if name in checks:
            found = checks[name](sizes, device)
        else:
            stage, model = name.rsplit("-", 1)
            check = check_step if stage == "step" else check_stage_one
            # The teacher of a model's rows makes the cache of its student's steps.
            found = check(self._inputs_of(model), self._folder / f"cache-{model}")
        if device.type == "cuda":
            torch.cuda.synchronize()  # what has failed on it fails here
            torch.cuda.empty_cache()
        return found

    def _inputs_of(self, model: str) -> Inputs:
        if self._inputs is None or self._inputs.name != model:
            self._inputs = None  # its memory first
            self._inputs = Inputs(model, self._sizes, self._device, self._folder / model)
        return self._inputs


def _machine(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What the card itself does: its copies and its products in half precision."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 64
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    memory = torch.ones(2**30 if gpu else 2**12, dtype=torch.uint8, device=device)

    def finished(job: Callable[[], Any]) -> None:
        job()
        wait_for(device)

    jobs: dict[str, Callable[[], Any]] = {
        "product": partial(finished, lambda: matrix @ matrix),
        "copy": partial(finished, memory.clone),
    }
    seconds = {name: min(taken) for name, taken in in_turns(jobs, sizes.repeats).items()}
    found: dict[str, Any] = {
        "TFLOP_per_second": 2 * size**3 / seconds["product"] / 1e12,
        "copied_GB_per_second": 2 * memory.numel() / seconds["copy"] / 1e9,
        "cores": os.cpu_count(),
        "kernels_of_triton": triton_runs_on(device),
    }
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_GiB": properties.total_memory / 2**30, "processors": properties.multi_processor_count}
    return found
