"""A student's settings as transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from transformers import TrainingArguments

from ..base import processes
from ..base.errors import RecipeError
from ..models.placement import Placement
from ..recipe.paths import StudentPaths
from ..recipe.student import StudentConfig

_WORKERS = 2
"""Processes that fetch and decode the next rows during a step."""


def loader_workers(config: StudentConfig, sources: Iterable[str], device: torch.device) -> int:
    """Processes that read rows: none for local caches and training on a CPU, where they would take cores from the
    step."""
    if config.loader_workers is not None:
        return config.loader_workers
    return _WORKERS if device.type != "cpu" or any("://" in source for source in sources) else 0


def training_arguments(
    config: StudentConfig,
    name: str,
    paths: StudentPaths,
    *,
    rows: int,
    seed: int,
    placement: Placement,
    workers: int,
    loggers: list[str],
) -> TrainingArguments:
    """The arguments of a training on `rows` rows; the step is the recipe's for any number of processes.

    Each process takes an equal share of a step's rows, batch_rows at once. Raises RecipeError for a step without one.
    """
    share, left_over = divmod(config.step_rows, processes.world_size())
    if left_over:
        raise RecipeError(
            f"students.{name}: a step of {config.step_rows} rows (batch_rows x accumulate) cannot be shared evenly by "
            f"{processes.world_size()} processes: make it a multiple of {processes.world_size()}"
        )
    micro_batches = -(-share // config.batch_rows)
    fsdp = config.parallel == "fsdp"
    return TrainingArguments(
        output_dir=str(paths.checkpoints),
        max_steps=config.steps if config.epochs is None else max(math.ceil(config.epochs * rows / config.step_rows), 1),
        per_device_train_batch_size=-(-share // micro_batches),
        gradient_accumulation_steps=micro_batches,
        fsdp=fsdp,
        fsdp_config={"version": 2} if fsdp else None,
        # Without KD and CE the output layer has no gradient.
        ddp_find_unused_parameters=config.kd_weight == 0.0 == config.ce_weight,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=placement.dtype == torch.bfloat16,
        fp16=placement.dtype == torch.float16,
        use_cpu=placement.device.type == "cpu",
        seed=seed,
        data_seed=seed,
        per_device_eval_batch_size=-(-share // micro_batches),
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        load_best_model_at_end=config.keep_best is not None,
        metric_for_best_model=config.keep_best,
        greater_is_better=None if config.keep_best is None else config.keep_best == "agreement",
        # The best of the checkpoints is the best of the evaluations where each of them saves one.
        save_steps=config.save_steps if config.keep_best is None else config.eval_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=workers,
        dataloader_pin_memory=placement.device.type == "cuda",
        report_to=[logger for logger in loggers if logger != "tensorboard"],
        run_name=name,
        project="logit-cache",
        disable_tqdm=True,
    )
