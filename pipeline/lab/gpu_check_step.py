"""A student's optimizer step on a device: from a cache, against cross-entropy by the same loss and by others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import first_line
from ..distill.loss_settings import LossSettings
from ..distill.student_loss import StudentLoss
from ..models.output_layer import OutputLayer
from ..models.placement import to_device
from ..models.rows import body_hidden, model_inputs
from ..store.batch import map_batch
from .bench_step import data_wait, peak_over_gradients
from .gpu_check_inputs import Inputs
from .host_waits import host_waits
from .kernel_times import kernel_times
from .timing import in_turns, ratios, wait_for

_WORKERS = 2
_LOADED_BATCHES = 12


def check_step(inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Time, peak memory, host waits and kernels of steps on the same rows, and the share that waits for the loader."""
    cache, device, sizes = inputs.maker.cache(folder), inputs.device, inputs.sizes
    student = inputs.model(torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    autocast = torch.autocast(device.type, inputs.dtype, enabled=inputs.dtype != torch.float32)
    batch = cache.batch(np.arange(sizes.student_rows))
    if device.type == "cuda":
        batch = map_batch(batch, lambda value: value.pin_memory())  # as the loader of training gives it
    losses = _losses(student, device)

    def step(name: str, batch: Any = batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            value = losses[name](batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def finished(name: str, batch: Any = batch) -> None:
        step(name, batch)
        wait_for(device)

    peer = _add_liger(losses, student, device, partial(finished, "liger"))
    jobs: dict[str, Callable[[], Any]] = {name: partial(finished, name) for name in losses}
    seconds = in_turns(jobs, sizes.repeats)
    peaks = {name: peak_over_gradients(jobs[name], student, device) for name in losses}
    workers = _WORKERS if device.type == "cuda" else 0
    waited = data_wait(student, cache, sizes.student_rows, workers, partial(finished, "shape"), _LOADED_BATCHES)
    tokens = sizes.student_rows * sizes.row_length
    found: dict[str, Any] = {
        "tokens_per_second": {name: tokens / median(taken) for name, taken in seconds.items()},
        "peak_MiB": {name: peak / 2**20 for name, peak in peaks.items()},
        "step_over_ce": max(median(ratios(seconds[name], seconds["ce"])) for name in ("shape", "bucket")),
        "step_over_hf": max(median(ratios(seconds[name], seconds["hf"])) for name in ("shape", "bucket")),
        "memory_over_hf": max(peaks["shape"], peaks["bucket"]) / max(peaks["hf"], 1.0),
        "runs": seconds,
        "data_wait": median(waited),
        "host_waits": dict(host_waits(partial(step, "shape"), device, student.parameters())),
        "kernels": kernel_times(partial(step, "shape"), device),
    }
    if "liger" in losses:
        found["step_over_liger"] = median(ratios(seconds["shape"], seconds["liger"]))
    return found | {"liger": peer}


def _losses(student: Any, device: torch.device) -> dict[str, Callable[[Any], Tensor]]:
    """The loss of a batch on the CPU by each way of training."""

    def from_cache(mode: str, settings: LossSettings, batch: Any) -> Tensor:
        loss = StudentLoss(mode, "causal", True, None)
        return loss(student, loss.on_device(student, batch, settings, device), settings, None)["loss"]

    def hf(batch: Any) -> Tensor:
        rows = _moved(batch, device)
        loss: Tensor = student(**model_inputs(rows, student), labels=rows["input_ids"]).loss
        return loss

    def body(batch: Any) -> Tensor:
        return body_hidden(student, batch["input_ids"], batch["segment_ids"]).float().mean()

    return {
        "shape": partial(from_cache, "cached", LossSettings(1.0, 1.0, 0.1, "shape")),
        "bucket": partial(from_cache, "cached", LossSettings(1.0, 1.0, 0.1, "bucket")),
        "shape, T = 2": partial(from_cache, "cached", LossSettings(2.0, 1.0, 0.1, "shape")),
        "ce": partial(from_cache, "ce", LossSettings(1.0, 0.0, 1.0)),
        "hf": hf,
        "body alone": body,
    }


def _moved(batch: Any, device: torch.device) -> dict[str, Tensor]:
    return {name: to_device(batch[name], device) for name in ("input_ids", "segment_ids", "labels")}


def _add_liger(
    losses: dict[str, Callable[[Any], Tensor]], student: Any, device: torch.device, step: Callable[[], None]
) -> str:
    """Add cross-entropy by Liger's fused output layer where a step with it runs on a GPU, and say whether it does: what
    is wrong with it costs no other figure."""
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return "no GPU" if device.type != "cuda" else "not installed"
    layer = OutputLayer.of(student)

    def liger(batch: Any) -> Tensor:
        fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(ignore_index=-100)
        rows = _moved(batch, device)
        hidden_ND = body_hidden(student, batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
        weight = layer.weight.to(torch.get_autocast_dtype("cuda"))
        loss: Tensor = fused(weight, hidden_ND.to(weight.dtype), rows["labels"].flatten())
        return loss

    losses["liger"] = liger
    try:
        step()
    except Exception as error:
        del losses["liger"]
        return f"{type(error).__name__}: {first_line(error)}"
    return "measured"
