"""metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..base.durable import write_bytes
from ..base.errors import RecipeError
from ..base.progress import Meter


def _loggers(wanted: list[str] | None, name: str) -> list[str]:
    """The loggers to report to: those of the recipe, else TensorBoard where it is installed."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = [logger for logger in wanted or [] if logger not in available]
    if missing:
        raise RecipeError(
            f"students.{name}.report_to: {missing[0]!r} is not installed, or no logger that transformers knows "
            f"(here are: {', '.join(available) or 'none'})"
        )
    return wanted if wanted is not None else [logger for logger in available if logger == "tensorboard"]


def _tensorboard(folder: Path) -> TrainerCallback:
    """Trainer's own TensorBoard logger, writing beside the run instead of below its checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class _StepLog(TrainerCallback):
    """metrics.jsonl beside the run, and how far it is, on a bar that `shown` closes."""

    def __init__(self, name: str, file: Path, tokens_per_step: int, shown: ExitStack) -> None:
        self._name, self._file, self._tokens, self._shown = name, file, tokens_per_step, shown
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.global_step
        left = (state.max_steps - state.global_step) * self._tokens
        self._meter = self._shown.enter_context(Meter(f"train {self._name}", left))
        if not state.is_world_process_zero:
            return
        # Steps after the checkpoint that is continued from are run again: their lines would stand twice.
        kept = [line for line in read_metrics(self._file) if line["step"] <= state.global_step]
        write_bytes(self._file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = f"step {state.global_step} of {state.max_steps}"
        if state.log_history:
            note += "".join(
                f"  {key} {state.log_history[-1][key]:.3f}" for key in ("kd", "ce") if key in state.log_history[-1]
            )
        self._meter.advance((state.global_step - self._seen) * self._tokens, note)
        self._seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a line cut short by a crash is left out."""

    def lines() -> Iterator[dict[str, float]]:
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    return list(lines())
