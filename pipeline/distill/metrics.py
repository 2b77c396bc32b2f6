"""The record of a training: metrics.jsonl, the progress bar, and the loggers of transformers."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..base.durable import write_bytes
from ..base.errors import RecipeError
from ..base.progress import Meter


def resolve_loggers(names: list[str] | None, student: str) -> list[str]:
    """The loggers of a student: those of the recipe, by default TensorBoard where it is installed.

    Raises RecipeError for a logger that is not available.
    """
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = [logger for logger in names or [] if logger not in available]
    if missing:
        raise RecipeError(
            f"students.{student}.report_to: {missing[0]!r} is not installed, or not a logger of transformers "
            f"(available: {', '.join(available) or 'none'})"
        )
    return names if names is not None else [logger for logger in available if logger == "tensorboard"]


def tensorboard_logger(folder: Path) -> TrainerCallback:
    """Trainer's own TensorBoard logger, writing to `folder` instead of a directory below the checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class StepLog(TrainerCallback):
    """Writes metrics.jsonl, and shows progress on a bar that `display` closes."""

    def __init__(self, name: str, file: Path, tokens_per_step: int, display: ExitStack) -> None:
        self._name, self._file, self._tokens, self._display = name, file, tokens_per_step, display
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.global_step
        left = (state.max_steps - state.global_step) * self._tokens
        self._meter = self._display.enter_context(Meter(f"train {self._name}", left))
        if not state.is_world_process_zero:
            return
        # Training repeats the steps after the checkpoint: their lines would be there twice.
        kept = [line for line in read_metrics(self._file) if line["step"] <= state.global_step]
        write_bytes(self._file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = f"step {state.global_step} of {state.max_steps}"
        last = state.log_history[-1] if state.log_history else {}
        note += "".join(f"  {key} {last[key]:.3f}" for key in ("kd", "ce") if key in last)
        self._meter.advance((state.global_step - self._seen) * self._tokens, note)
        self._seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl without those that a crash cut short; none where there is no file."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines
