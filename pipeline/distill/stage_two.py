"""Stage two: a student trained from the cache with transformers' Trainer; the teacher's weights are not needed."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from ..base import processes
from ..base.durable import TEMPORARY, publish_directory, read_json, write_json
from ..base.errors import MismatchError, RecipeError
from ..base.provenance import provenance
from ..models.loading import quiet_transformers
from ..models.placement import choose_placement
from ..models.teacher import Teacher
from ..recipe.paths import StudentPaths
from ..recipe.student import StudentConfig
from ..store.row_source import Rows
from . import divergences
from .loss import check_settings
from .matching import Matching
from .metrics import _loggers, _StepLog, _tensorboard
from .schedules import as_function
from .student import _shared_beside_embeddings, _student_tokenizer, _with_adapters, build_student
from .student_rows import student_rows
from .trainer import PROJECTION, DistillationTrainer

logger = logging.getLogger(__name__)

_WORKERS = 2  # fetch and decode the next rows while a step is computed


def loader_workers(config: StudentConfig, sources: Iterable[str], device: torch.device) -> int:
    """Processes that read rows: none where a step on the same cores would only be slowed down by them."""
    if config.loader_workers is not None:
        return config.loader_workers
    return _WORKERS if device.type != "cpu" or any("://" in source for source in sources) else 0


def train(
    config: StudentConfig, name: str, cache: Rows, folder: Path, *, seed: int, teacher: Teacher | None = None
) -> None:
    """Train one student to the end, continuing from its last checkpoint.

    Leaves in `folder`: final/ (model and tokenizer), metrics.jsonl, run.json (settings and cache), provenance.json (what
    computed it), tensorboard/ where that is installed. Raises MismatchError for a finished or
    begun student that was made with other settings or from another cache.
    """
    sources = config.caches or config.teachers or [str(getattr(cache, "path", ""))]
    cache = student_rows(config, cache, seed)
    try:
        divergences.check(config.divergence, config.alpha)
        if config.mode == "cached" and len(cache):
            targets = cache.batch([0])["targets"]
            check_settings(targets, cache.vocab_size, config.temperature, config.tail, config.divergence, config.alpha)
    except ValueError as error:
        raise RecipeError(f"students.{name}: {error}") from error
    paths = StudentPaths(folder)
    final = paths.final
    run: dict[str, Any] = {"config": config.model_dump(mode="json"), "cache": cache.digest, "seed": seed}
    previous = read_json(paths.record, f"delete {folder} and train again")
    if previous is not None and previous != run:
        changed = [key for key in run["config"] if previous["config"].get(key) != run["config"][key]]
        changed += [key for key in ("cache", "seed") if previous[key] != run[key]]
        raise MismatchError(
            f"{folder}: this student was begun with other settings ({', '.join(changed)} differ): give the new one another "
            "name, or delete that directory"
        )
    if paths.finished:
        logger.info(f"train {name}: done, {final}")
        return
    report_to = _loggers(config.report_to, name)
    tokenizer = _student_tokenizer(config, cache)
    placement = choose_placement(config.device, config.dtype)
    model = build_student(config, paths, seed, cache.objective)
    matching = Matching(**{field: getattr(config, field) for field in Matching.__dataclass_fields__})
    if config.mode == "cached":
        matching.check(model.config, cache.signals, cache.row_length, f"students.{name}: ")
        if config.lora is not None and matching.projection(model.config, cache.signals) is not None:
            raise RecipeError(
                f"students.{name}: lora leaves the student's width as it is, and the map from it to the teacher's would be lost "
                "with every checkpoint: match layers of the same width, or train without lora"
            )
    if config.lora is not None:
        model = _with_adapters(model, config.lora, name)
    placement = replace(placement, attention=model.config._attn_implementation)
    logger.info(f"train {name}: mode {config.mode}, {placement}")
    step_rows, world_size = config.batch_rows * config.accumulate, processes.world_size()
    if step_rows % world_size:
        raise RecipeError(
            f"students.{name}: a step of {step_rows} rows (batch_rows x accumulate) cannot be shared evenly by "
            f"{world_size} processes: make it a multiple of {world_size}"
        )
    if config.parallel == "fsdp" and not processes.launched():
        raise RecipeError(f"students.{name}: parallel = 'fsdp' needs torchrun, also for one process")
    if config.parallel == "fsdp" and config.lora is not None:
        raise RecipeError(f"students.{name}: adapters (lora) are small and trained with parallel = 'ddp'")
    if config.parallel == "fsdp" and (shared := _shared_beside_embeddings(model)):
        raise RecipeError(
            f"students.{name}: parallel = 'fsdp' cannot shard what this model shares between modules ({', '.join(shared)}): "
            "use 'ddp'"
        )
    # The step is the recipe's, whatever the number of processes: each takes its part of the rows, batch_rows at once.
    steps = config.steps if config.epochs is None else max(math.ceil(config.epochs * len(cache) / step_rows), 1)
    share = step_rows // world_size
    micro_batches = -(-share // config.batch_rows)
    args = TrainingArguments(
        output_dir=str(paths.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=-(-share // micro_batches),
        gradient_accumulation_steps=micro_batches,
        fsdp=config.parallel == "fsdp",
        fsdp_config={"version": 2} if config.parallel == "fsdp" else None,
        # Without KD and CE the output layer has no part in the loss.
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
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=loader_workers(config, sources, placement.device),
        dataloader_pin_memory=placement.device.type == "cuda",
        report_to=[target for target in report_to if target != "tensorboard"],
        run_name=name,
        project="logit-cache",
        disable_tqdm=True,
    )
    callbacks: list[TrainerCallback] = []
    if args.should_save:
        write_json(paths.record, run)
        write_json(paths.provenance, {**provenance(), "placement": str(placement), "cache": cache.digest})
        if "tensorboard" in report_to:
            callbacks.append(_tensorboard(paths.tensorboard))
    trainer = DistillationTrainer(
        model,
        args,
        cache,
        mode=config.mode,
        temperature=config.temperature,
        kd_weight=as_function(config.kd_weight),
        ce_weight=as_function(config.ce_weight),
        tail=config.tail,
        divergence=config.divergence,
        alpha=config.alpha,
        matching=matching,
        teacher=teacher,
        step_rows=step_rows,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    last = _last_checkpoint(paths.checkpoints)
    if last is not None:
        logger.info(f"train {name}: continuing from {last}")
    # However the training ends, the terminal gets its cursor back.
    with ExitStack() as shown, quiet_transformers():
        trainer.add_callback(_StepLog(name, paths.metrics, step_rows * cache.row_length, shown))
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    if hasattr(model, PROJECTION):
        delattr(model, PROJECTION)  # it served the training; checkpoints keep it
    aside = final.with_name(final.name + TEMPORARY)
    if args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    with quiet_transformers():
        if config.lora is None:
            trainer.save_model(str(aside))  # every process has a part in it where the weights are sharded
        elif args.should_save:
            # A plain model, adapters folded in: evaluation and inference need no peft.
            model.merge_and_unload().save_pretrained(aside)
    if args.should_save:
        tokenizer.save_pretrained(aside)
        publish_directory(aside, final)
    trainer.accelerator.wait_for_everyone()
    logger.info(f"train {name}: done, {final}")


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: trainer_state.json is what Trainer writes last, and ends as JSON does."""
    for state in sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step_of, reverse=True):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue
        return state.parent
    return None


def _step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])
