"""Stage two: students trained from the cache with transformers' Trainer; the teacher's weights are not needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..base import processes
from ..base.durable import publish_directory, read_json, remove_staged, staging_path, write_json
from ..base.errors import IncompleteError, MismatchError, Preempted, RecipeError, recipe_error
from ..base.lock import claimed
from ..base.provenance import provenance
from ..models.loading import quiet_transformers
from ..models.placement import choose_placement
from ..models.probe import check_model
from ..models.teacher import Teacher, teacher_of
from ..recipe.loading import save_resolved
from ..recipe.paths import StudentPaths
from ..recipe.schema import Recipe
from ..recipe.student import StudentConfig, deciding_settings
from ..store.reader import LogitCache
from ..store.row_source import RowSource
from .loss_settings import LossSettings
from .matching import Matching
from .metrics import StepLog, resolve_loggers, tensorboard_logger
from .stopping import noted_signals
from .student import add_adapters, build_student, shared_parameters, student_tokenizer
from .student_loss import PROJECTION
from .student_rows import evaluation_rows, student_rows
from .trainer import DistillationTrainer
from .training_arguments import loader_workers, training_arguments

logger = logging.getLogger(__name__)


def train_students(recipe: Recipe, students: Sequence[str] | None = None, partial: bool = False) -> None:
    """Train a recipe's students: see `logit_cache.distill.run`."""
    names = recipe.chosen_students(students)
    if not names:
        raise RecipeError("the recipe has no student: add a [students.NAME] table")
    configs = {name: recipe.student(name) for name in names}
    cache = None
    if any(config.needs_own_cache for config in configs.values()):
        cache = _own_cache(recipe, partial)
    heldout = None
    if any(config.eval_steps is not None for config in configs.values()):
        heldout = LogitCache(recipe.paths.heldout)
    save_resolved(recipe, recipe.paths.recipe)
    for name, config in configs.items():
        paths = recipe.paths.student(name)
        teacher = teacher_of(recipe) if config.mode == "online" and not paths.finished else None
        seed = recipe.student_seed(name)
        train_student(config, name, cache, paths.folder, seed=seed, teacher=teacher, heldout=heldout)


def _own_cache(recipe: Recipe, partial: bool) -> LogitCache:
    cache = LogitCache(recipe.paths.cache, partial=partial)
    if not len(cache):
        raise IncompleteError(f"{cache.path}: no shard is committed yet: wait for the first one of `logit-cache cache`")
    if not cache.complete:
        logger.info(f"train: {cache.path} is not complete: {len(cache):,} of {cache.manifest.rows:,} rows")
    return cache


def train_student(
    config: StudentConfig,
    name: str,
    cache: RowSource | None,
    folder: Path,
    *,
    seed: int,
    teacher: Teacher | None = None,
    heldout: RowSource | None = None,
) -> None:
    """Train one student to the end, continuing from its last checkpoint; `StudentPaths` names what it leaves in
    `folder`.

    `cache` may be None for a student of other caches. Raises RecipeError for settings that cannot be used,
    MismatchError for a student that was begun with other settings or from another cache, IncompleteError while another
    process trains it, Preempted for a training that saved because it was told to stop.
    """
    paths = StudentPaths(folder)
    sources = config.caches or config.teachers or [str(getattr(cache, "path", ""))]
    rows = student_rows(config, name, cache, seed)
    for readers in rows.readers:
        readers.copy_to(config.local_store, config.local_bytes)
    _check_loss(config, name, rows)
    heldout = evaluation_rows(config, name, rows, heldout)
    run: dict[str, Any] = {"config": config.model_dump(mode="json"), "cache": rows.digest, "seed": seed}
    if heldout is not None and config.keep_best is not None:
        run["heldout"] = heldout.digest
    _check_record(paths, run)
    if paths.finished:
        logger.info(f"train {name}: done, {paths.final}")
        return
    loggers = resolve_loggers(config.report_to, name)
    tokenizer = student_tokenizer(config, rows)
    placement = choose_placement(config.device, config.dtype)
    matching = Matching(**{field.name: getattr(config, field.name) for field in fields(Matching)})
    model = _prepared_student(config, name, rows, paths, seed, matching)
    probe = check_model(model)
    placement = replace(placement, attention=probe.attention, reason=f"{placement.reason}; {probe}")
    logger.info(f"train {name}: mode {config.mode}, {placement}")
    _check_sharding(config, name, model)
    args = training_arguments(
        config,
        name,
        paths,
        rows=len(rows),
        seed=seed,
        placement=placement,
        workers=loader_workers(config, sources, placement.device),
        loggers=loggers,
    )
    with _alone(paths, name) if args.should_save else nullcontext():
        _check_record(paths, run)
        if paths.finished and processes.world_size() == 1:  # by the process that had the lock before
            logger.info(f"train {name}: done, {paths.final}")
            return
        callbacks: list[TrainerCallback] = []
        if args.should_save:
            write_json(paths.record, run)
            write_json(paths.provenance, {**provenance(), "placement": str(placement), "cache": rows.digest})
            if "tensorboard" in loggers:
                callbacks.append(tensorboard_logger(paths.tensorboard))
        with noted_signals() as stop:
            trainer = DistillationTrainer(
                model,
                args,
                rows,
                mode=config.mode,
                temperature=config.temperature,
                kd_weight=config.kd_weight,
                ce_weight=config.ce_weight,
                tail=config.tail,
                divergence=config.divergence,
                alpha=config.alpha,
                matching=matching,
                teacher=teacher,
                step_rows=config.step_rows,
                window=config.window,
                stop=stop,
                eval_dataset=heldout,
                callbacks=callbacks,
            )
            _train(trainer, name, paths, config.step_rows * rows.row_length)
            if trainer.state.global_step < trainer.state.max_steps:
                raise Preempted(
                    f"stopped by {stop.signal_name or 'a signal to another process'}: {name} is saved at step "
                    f"{trainer.state.global_step} of {trainer.state.max_steps}; the same command continues"
                )
        _publish(trainer, config, tokenizer, paths)
    logger.info(f"train {name}: done, {paths.final}")


def _alone(paths: StudentPaths, name: str) -> AbstractContextManager[None]:
    """The lock of a student's directory. Raises IncompleteError where another process trains this student."""

    def busy(holder: str) -> IncompleteError:
        return IncompleteError(f"{paths.folder}: {holder}, trains {name}: wait for it to end, or stop it")

    return claimed(paths.lock, busy)


def _check_loss(config: StudentConfig, name: str, cache: RowSource) -> None:
    """Raises RecipeError for loss settings that cannot be used, alone or with the targets of the cache."""
    with recipe_error(f"students.{name}"):
        settings = LossSettings(config.temperature, 1.0, 0.0, config.tail, config.divergence, config.alpha)
        if config.mode == "cached" and len(cache):
            settings.fit(cache.batch([0])["targets"], cache.vocab_size)


def _check_record(paths: StudentPaths, run: dict[str, Any]) -> None:
    """Raises MismatchError where the directory belongs to a training of other weights: other settings, cache or seed."""
    previous = read_json(paths.record, f"delete {paths.folder} and train again")
    if previous is None:
        return
    before, now = (deciding_settings(each["config"]) for each in (previous, run))
    changed = [key for key in now if before.get(key) != now[key]]
    changed += [key for key in ("cache", "seed", "heldout") if previous.get(key) != run.get(key)]
    if changed:
        raise MismatchError(
            f"{paths.folder}: this student was begun with other settings ({', '.join(changed)} differ): rename the new "
            "student or delete that directory"
        )


def _prepared_student(
    config: StudentConfig, name: str, cache: RowSource, paths: StudentPaths, seed: int, matching: Matching
) -> Any:
    """The student with its first weights and adapters. Raises RecipeError for layers that cannot be matched."""
    model = build_student(config, paths, seed, cache.objective)
    if config.mode == "cached":
        matching.check(model.config, cache.signals, cache.row_length, f"students.{name}: ")
        if config.lora is not None and matching.projection(model.config, cache.signals) is not None:
            raise RecipeError(
                f"students.{name}: lora keeps the student's width, and checkpoints of adapters lack the map from it to the "
                "teacher's width: match layers of the same width, or train without lora"
            )
    return model if config.lora is None else add_adapters(model, config.lora, name)


def _check_sharding(config: StudentConfig, name: str, model: Any) -> None:
    """Raises RecipeError where the processes cannot shard the student's weights."""
    if config.parallel != "fsdp":
        return
    if not processes.launched():
        raise RecipeError(f"students.{name}: parallel = 'fsdp' needs torchrun, also for one process")
    if config.lora is not None:
        raise RecipeError(f"students.{name}: parallel = 'fsdp' cannot train adapters (lora): use 'ddp', they are small")
    if shared := shared_parameters(model):
        raise RecipeError(
            f"students.{name}: parallel = 'fsdp' cannot shard parameters that modules share ({', '.join(shared)}): use 'ddp'"
        )


def _train(trainer: DistillationTrainer, name: str, paths: StudentPaths, tokens_per_step: int) -> None:
    """Run the training from its last whole checkpoint, with metrics.jsonl and a progress bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = _last_checkpoint(paths.checkpoints)
    if checkpoint is not None:
        logger.info(f"train {name}: continuing from {checkpoint}")
    # The display restores the terminal's cursor also after an exception.
    with ExitStack() as display, quiet_transformers():
        trainer.add_callback(StepLog(name, paths, tokens_per_step, display))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)


def _publish(trainer: DistillationTrainer, config: StudentConfig, tokenizer: Any, paths: StudentPaths) -> None:
    """Write the trained model, adapters merged, and its tokenizer to `paths.final` in one step."""
    model, first = trainer.model, trainer.args.should_save
    if hasattr(model, PROJECTION):
        delattr(model, PROJECTION)  # part of the training; checkpoints keep it
    staging = staging_path(paths.final)
    if first:
        remove_staged(paths.final)
    with quiet_transformers():
        if config.lora is None:
            trainer.save_model(str(staging))  # a collective operation where the weights are sharded
        elif first:
            # A plain model: evaluation and inference need no peft.
            model.merge_and_unload().save_pretrained(staging)
    if first:
        tokenizer.save_pretrained(staging)
        publish_directory(staging, paths.final)
    trainer.accelerator.wait_for_everyone()


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: Trainer writes trainer_state.json last, so valid JSON there means a whole one."""
    for state in sorted(
        folder.glob("checkpoint-*/trainer_state.json"),
        key=lambda state: int(state.parent.name.rpartition("-")[2]),
        reverse=True,
    ):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue
        return state.parent
    return None
