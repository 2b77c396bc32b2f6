"""The record of a training: its files of JSON lines, the progress bar, and the loggers of transformers."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..base.durable import write_bytes
from ..base.errors import RecipeError
from ..base.progress import Meter
from ..recipe.paths import StudentPaths

logger = logging.getLogger(__name__)


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
    """Writes metrics.jsonl and evaluations.jsonl, and shows progress on a bar that `display` closes.

    A training that evaluates does so after its last step too.
    """

    def __init__(self, name: str, paths: StudentPaths, tokens_per_step: int, display: ExitStack) -> None:
        self._name, self._paths, self._tokens, self._display = name, paths, tokens_per_step, display
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.global_step
        left = (state.max_steps - state.global_step) * self._tokens
        self._meter = self._display.enter_context(Meter(f"train {self._name}", left))
        if not state.is_world_process_zero:
            return
        # Training repeats the steps after the checkpoint: their lines would be there twice.
        for file in (self._paths.metrics, self._paths.evaluations):
            if file.exists() or file == self._paths.metrics:
                kept = [line for line in read_metrics(file) if line["step"] <= state.global_step]
                write_bytes(file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = f"step {state.global_step} of {state.max_steps}"
        last: dict[str, float] = next((line for line in reversed(state.log_history) if "loss" in line), {})
        note += "".join(f"  {key} {last[key]:.3f}" for key in ("kd", "ce") if key in last)
        self._meter.advance((state.global_step - self._seen) * self._tokens, note)
        self._seen = state.global_step
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            _append(self._paths.metrics, {"step": state.global_step, **logs})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        found = {
            name: metrics[f"eval_{name}"] for name in ("loss", "kd", "ce", "agreement") if f"eval_{name}" in metrics
        }
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        logger.info(f"train {self._name}: step {state.global_step}, held-out rows: {shown}")
        if state.is_world_process_zero:
            _append(self._paths.evaluations, {"step": state.global_step, **found})


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl without those that a crash cut short; none where there is no file."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines
