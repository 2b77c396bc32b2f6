"""A recipe made smaller, so that its run ends within the minutes that there are.

Machines of two cores differ by a factor of ten and more. Teacher and student are timed here on a few rows, the seconds
of a run follow from these times, and rows, steps and warm-up are lowered together until they fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..base.errors import RecipeError
from ..capture.learning import learning_rows
from ..corpus.labels import next_token_labels
from ..distill.fused import fused_loss
from ..distill.loss_settings import LossSettings
from ..models.output_layer import OutputLayer
from ..models.placement import choose_placement
from ..models.rows import body_hidden
from ..models.teacher import Teacher, teacher_of
from ..recipe.schema import Recipe
from ..recipe.student import StudentConfig
from .bench_step import student_of
from .timing import seconds_of, wait_for

COMMANDS = 5
"""prepare, cache, train, evaluate, report."""
LEAST_STEPS, LEAST_HELDOUT_ROWS = 12, 16
"""Fewer teach a student of teacher layers nothing that held-out rows would show."""
_CAPTURE, _LEARNING = 1.2, 4.0
"""Seconds of stage one for a token, and of learning codebook and basis from one, over those of the teacher's forward
pass."""


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine."""

    start: float
    """Of one command, until its models are loaded."""
    teacher: float
    """Of a token in the teacher's forward pass."""
    student: float
    """Of a token in a training step."""
    update: float
    """Of the optimizer in a training step."""


def run_seconds(recipe: Recipe, speeds: Speeds) -> float:
    """Expected seconds of both stages, evaluation and report of a recipe with `corpus.max_rows` and
    `corpus.max_heldout_rows`."""
    corpus, students = recipe.corpus, recipe.students.values()
    sides = (corpus.max_rows or 0), (corpus.max_heldout_rows or 0)
    learned = sum(len(learning_rows(rows, corpus.row_length)) for rows in sides)
    forward = _CAPTURE * sum(sides) + _LEARNING * learned + sides[1]
    steps = sum(_steps(student, sides[0]) * speeds.update for student in students)
    trained = sum(_steps(student, sides[0]) * student.step_rows for student in students)
    tested = sides[1] * len(students) / 3  # a forward pass is a third of a step
    tokens = corpus.row_length * (forward * speeds.teacher + (trained + tested) * speeds.student)
    return COMMANDS * speeds.start + tokens + steps


def resized(recipe: Recipe, speeds: Speeds, seconds: float) -> Recipe:
    """The recipe with as many rows and steps as fit in `seconds`, at most its own, at least some.

    The same share of rows, held-out rows, steps and warm-up steps is kept, so that students see each row as often.
    """
    if run_seconds(recipe, speeds) <= seconds:
        return recipe
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if run_seconds(_part(recipe, middle), speeds) <= seconds else (low, middle)
    return _part(recipe, low)


def measure_speeds(recipe: Recipe, begun: float) -> Speeds:
    """Time the recipe's teacher and a step of its first student. `begun`: when this command did, by `time.monotonic`.

    Raises RecipeError for a recipe without students or limits of rows, and for masked rows.
    """
    config = next(iter(recipe.students.values()), None)
    if config is None or recipe.corpus.objective != "causal":
        raise RecipeError("only a recipe with a student and causal rows can be resized")
    if recipe.corpus.max_rows is None or recipe.corpus.max_heldout_rows is None:
        raise RecipeError("a recipe is resized by its rows: set corpus.max_rows and corpus.max_heldout_rows")
    teacher = teacher_of(recipe)
    start = time.monotonic() - begun
    ids_BL = torch.randint(teacher.vocab_size, (2, recipe.corpus.row_length))
    forward = _teacher_seconds(teacher, ids_BL)
    student, update = _student_seconds(config, recipe, teacher, ids_BL)
    return Speeds(start, forward / ids_BL.numel(), student / ids_BL.numel(), update)


def _part(recipe: Recipe, share: float) -> Recipe:
    corpus = recipe.corpus

    def fewer(count: int, least: int) -> int:
        return min(count, max(round(count * share), least))

    def shorter(student: StudentConfig) -> StudentConfig:
        steps = fewer(student.steps, LEAST_STEPS)
        return student.model_copy(
            update={"steps": steps, "warmup_steps": student.warmup_steps * steps // student.steps}
        )

    students = {name: shorter(student) for name, student in recipe.students.items()}
    least = max((LEAST_STEPS * student.step_rows for student in recipe.students.values()), default=1)
    limits = {
        "max_rows": fewer(corpus.max_rows or 0, least),
        "max_heldout_rows": fewer(corpus.max_heldout_rows or 0, LEAST_HELDOUT_ROWS),
    }
    return recipe.model_copy(update={"corpus": corpus.model_copy(update=limits), "students": students})


def _steps(student: StudentConfig, rows: int) -> int:
    return student.steps if student.epochs is None else max(round(student.epochs * rows / student.step_rows), 1)


def _teacher_seconds(teacher: Teacher, ids_BL: torch.Tensor) -> float:
    """Of a forward pass with the logits of all positions."""

    def forward() -> None:
        hidden_ND = teacher.hidden(ids_BL, torch.zeros_like(ids_BL)).flatten(0, 1)
        for some in torch.split(hidden_ND, 256):
            teacher.output_layer.logits(some)
        wait_for(teacher.placement.device)

    return _second_time(forward)


def _student_seconds(
    config: StudentConfig, recipe: Recipe, teacher: Teacher, ids_BL: torch.Tensor
) -> tuple[float, float]:
    """Of loss and gradient of these rows, and of the optimizer's step."""
    placement = choose_placement(config.device, config.dtype)
    student = student_of(config, recipe, teacher).to(placement.device)
    optimizer, layer = torch.optim.AdamW(student.parameters(), lr=1e-5), OutputLayer.of(student)
    segments_BL = torch.zeros_like(ids_BL)
    labels_BL = torch.from_numpy(next_token_labels(ids_BL.numpy(), segments_BL.numpy()))
    ids_BL, segments_BL, labels_BL = (x.to(placement.device) for x in (ids_BL, segments_BL, labels_BL))
    mode = LossSettings(kd_weight=0.0, ce_weight=1.0)

    def gradient() -> None:
        optimizer.zero_grad()
        with torch.autocast(placement.device.type, placement.dtype, enabled=placement.dtype != torch.float32):
            hidden_BLD = body_hidden(student, ids_BL, segments_BL)
            loss = fused_loss(hidden_BLD, layer, None, labels_BL, mode).loss
        loss.backward()  # type: ignore[no-untyped-call]
        wait_for(placement.device)

    def update() -> None:
        optimizer.step()
        wait_for(placement.device)

    return _second_time(gradient), _second_time(update)


def _second_time(job: Callable[[], None]) -> float:
    """Seconds of a job, which is slower the first time."""
    job()
    return seconds_of(job)
