"""handover."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch

from ..base import processes
from ..base.durable import TEMPORARY, discard, publish_directory, staging_directory, write_json
from ..base.errors import storage_error
from ..corpus.rows import PackedRows
from ..models.loading import load_model, load_tokenizer, quiet_transformers
from ..models.placement import has_local_weights
from ..models.speed import forward_speed, model_bytes
from ..models.student_layers import layers_to_copy, student_from_layers
from ..models.teacher import Teacher
from ..recipe.schema import Recipe
from .prompt_sample import save_prompt_sample

logger = logging.getLogger(__name__)


def export_for_students(recipe: Recipe, teacher: Teacher, source: str) -> None:
    """Leave beside the cache what later stages need of the teacher, so that they never open it.

    The first weights of every student that is made of its layers, its size and speed for the result table, and what it says
    after the report's prompt. Of a shared
    teacher all processes must come here, and the first one writes.
    """
    facts = recipe.paths.teacher_facts
    weights = teacher.identity["weights"]
    if _read_json(facts).get("weights") != weights:
        folder = Path(source)
        parameters = sum(p.numel() for p in teacher.model.parameters())
        size = model_bytes(folder) if folder.is_dir() else parameters * teacher.placement.dtype.itemsize
        speed = forward_speed(teacher.model, PackedRows(recipe.paths.cache / "corpus"))
        if processes.rank() == 0:
            write_json(facts, {"weights": weights, "parameters": parameters, "bytes": size, "tokens_per_second": speed})
    if recipe.report.prompt is not None and not teacher.tensor_parallel:
        tokenizer = load_tokenizer(source, recipe.teacher.revision)
        save_prompt_sample(teacher, tokenizer, recipe.report.prompt, recipe.paths.prompt_sample, recipe.seed)
    whole = None
    for name, student in recipe.students.items():
        if student.layers is None or processes.rank() > 0:
            continue
        paths = recipe.paths.student(name)
        start = paths.start
        origin = {"layers": student.layers, "token_types": student.token_types, "weights": weights}
        if _read_json(paths.start_record) == origin:
            continue
        if whole is None:
            whole = teacher.model
            if not has_local_weights(whole):
                whole = load_model(
                    source,
                    replace(teacher.placement, device=torch.device("cpu")),
                    recipe.teacher.revision,
                    objective=recipe.corpus.objective,
                )
        model = student_from_layers(whole, student.layers, student.token_types)
        try:
            with staging_directory(start) as aside:
                with quiet_transformers():
                    model.save_pretrained(aside)
                write_json(aside / paths.start_record.name, origin)
                if _read_json(paths.start_record) != origin:  # else another task may have discarded a part of this
                    publish_directory(aside, start)
        except Exception as error:
            if storage_error(error) is not None or _read_json(paths.start_record) != origin:
                raise  # else another task has written it, and cleared away what it found beside it
        for leftover in start.parent.glob(f"{start.name}{TEMPORARY}*"):
            discard(leftover)
        logger.info(
            f"cache: first weights of student {name!r} (teacher layers {_chosen(teacher, student.layers)}) in {start}"
        )


def _chosen(teacher: Teacher, layers: int | list[int]) -> list[int]:
    return layers_to_copy(layers, int(teacher.model.config.get_text_config().num_hidden_layers))


def _read_json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
