"""What stage one leaves for later stages, so that they never load the teacher.

The first weights of each student that copies teacher layers, the teacher's size and speed for the result table, and the
teacher's continuation of the report's prompt. Each file names the digest of the weights that it was made from, and is
made again for other weights only.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base import processes
from ..base.durable import TEMPORARY, discard, publish_directory, read_json, staging_directory, write_json
from ..base.errors import CorruptError, RecipeError, storage_error
from ..corpus.rows import PackedRows
from ..models.loading import load_model, quiet_transformers
from ..models.placement import has_local_weights
from ..models.speed import forward_speed
from ..models.student_layers import check_layers, layer_list, layers_to_copy, student_from_layers
from ..models.teacher import Teacher
from ..models.teacher_source import teacher_tokenizer
from ..models.weights import model_bytes
from ..recipe.paths import StudentPaths
from ..recipe.schema import Recipe
from ..recipe.student import StudentConfig
from .prompt_sample import has_prompt_sample, save_prompt_sample

logger = logging.getLogger(__name__)


def check_students(recipe: Recipe, teacher: Teacher) -> None:
    """Raise RecipeError, naming the student, where it cannot be made of the teacher's layers that it asks for."""
    for name, student in recipe.students.items():
        if student.layers is None:
            continue
        try:
            check_layers(teacher.model, student.layers, student.token_types)
        except RecipeError as error:
            raise RecipeError(f"students.{name}: {error}") from error


def export_for_students(recipe: Recipe, teacher: Teacher) -> None:
    """Write the hand-over files of a run that are not there yet.

    All processes of a tensor-parallel teacher must call it, since the measurement of speed runs the model; the first
    one writes.
    """
    _save_facts(recipe, teacher)
    if recipe.report.prompt is not None and not teacher.tensor_parallel:
        tokenizer = teacher_tokenizer(recipe)
        save_prompt_sample(teacher, tokenizer, recipe.report.prompt, recipe.paths.prompt_sample, recipe.seed)
    if processes.rank() == 0:
        _save_first_weights(recipe, teacher)


def handed_over(recipe: Recipe, weights: str) -> bool:
    """Whether every hand-over file is there, made from these weights."""
    paths, prompt = recipe.paths, recipe.report.prompt
    sampled = prompt is None or (recipe.teacher.parallel == "tensor" and processes.world_size() > 1)
    return (
        _made_from(paths.teacher_facts).get("weights") == weights
        and (sampled or has_prompt_sample(paths.prompt_sample, prompt or "", weights, recipe.seed))
        and all(
            _made_from(paths.student(name).start_record) == _origin(student, weights)
            for name, student in recipe.students.items()
            if student.layers is not None
        )
    )


def _origin(student: StudentConfig, weights: str) -> dict[str, Any]:
    return {"layers": student.layers, "token_types": student.token_types, "weights": weights}


def _save_facts(recipe: Recipe, teacher: Teacher) -> None:
    file, weights = recipe.paths.teacher_facts, teacher.identity["weights"]
    if _made_from(file).get("weights") == weights:
        return
    folder = Path(teacher.source)
    parameters = sum(p.numel() for p in teacher.model.parameters())
    size = model_bytes(folder) if folder.is_dir() else parameters * teacher.placement.dtype.itemsize
    corpus = PackedRows.of_cache(recipe.paths.cache)
    speed = forward_speed(teacher.model, corpus.columns(np.arange(min(4, corpus.rows))))
    if processes.rank() == 0:
        write_json(file, {"weights": weights, "parameters": parameters, "bytes": size, "tokens_per_second": speed})


def _save_first_weights(recipe: Recipe, teacher: Teacher) -> None:
    """The first weights of every student of the recipe that copies teacher layers."""
    whole = None
    for name, student in recipe.students.items():
        if student.layers is None:
            continue
        paths = recipe.paths.student(name)
        origin = _origin(student, teacher.identity["weights"])
        if _made_from(paths.start_record) == origin:
            continue
        if whole is None:
            whole = _with_local_weights(recipe, teacher)
        _publish_start(student_from_layers(whole, student.layers, student.token_types), paths, origin)
        layers = layers_to_copy(student.layers, layer_list(whole)[1])
        logger.info(f"cache: first weights of student {name!r} (teacher layers {layers}) in {paths.start}")


def _with_local_weights(recipe: Recipe, teacher: Teacher) -> Any:
    """The teacher's model, loaded again on the CPU where its weights are spread over processes or devices."""
    if has_local_weights(teacher.model):
        return teacher.model
    placement = replace(teacher.placement, device=torch.device("cpu"))
    config, objective = recipe.teacher, recipe.corpus.objective
    trust = config.trust_remote_code
    return load_model(teacher.source, placement, config.revision, objective=objective, trust_remote_code=trust)


def _publish_start(model: Any, paths: StudentPaths, origin: dict[str, Any]) -> None:
    try:
        with staging_directory(paths.start) as staged:
            with quiet_transformers():
                model.save_pretrained(staged)
            write_json(staged / paths.start_record.name, origin)
            if _made_from(paths.start_record) != origin:  # else another task may have discarded a part of `staged`
                publish_directory(staged, paths.start)
    except Exception as error:
        # Another task may have published the same weights and removed this task's staging directory.
        if storage_error(error) is not None or _made_from(paths.start_record) != origin:
            raise
    for leftover in paths.start.parent.glob(f"{paths.start.name}{TEMPORARY}*"):
        discard(leftover)


def _made_from(file: Path) -> dict[str, Any]:
    """The content of a hand-over file; empty where it is missing or damaged, so that it is made again."""
    try:
        value = read_json(file, "it is made again")
    except CorruptError:
        return {}
    return value if isinstance(value, dict) else {}
