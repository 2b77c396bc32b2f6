"""Where does a student of a cache end? The same student from every kind of target, over several seeds.

A study is a recipe with a [study] table. For a seed, all arms start from the same weights and see the same rows in the
same order; only the targets differ, so that differences between arms are paired. A study that runs again does the
missing runs only (`study_results`). Each arm has all of its seeds before the next begins: what is there has its interval.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import torch

from ..assess.evaluation import evaluate_student, evaluate_teacher
from ..base.durable import read_json
from ..base.errors import IncompleteError, RecipeError
from ..capture.handover import export_for_students
from ..capture.stage_one import fill_caches
from ..corpus.prepare import prepare_corpus
from ..distill.metrics import read_metrics
from ..distill.stage_two import train_student
from ..models.loading import load_model, max_positions
from ..models.placement import choose_placement
from ..models.teacher import Teacher, teacher_of
from ..models.teacher_source import teacher_config, teacher_tokenizer
from ..recipe.loading import save_resolved
from ..recipe.paths import StudentPaths
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from ..store.views import Subset
from .study_arms import STUDENT, Arm, arms, cache_recipe
from .study_results import Result, Study, read_result, read_teacher, summarise, write_result, write_teacher
from .teaching import teach

_CURVE_ROWS = 16
"""Held-out rows of the evaluations in training."""
_MASS_ROWS = 32
"""Rows that the mass of the head is averaged over."""


def run_study(recipe: Recipe) -> Study:
    """Do all missing runs; the teacher is made and loaded only where a run needs it.

    Raises RecipeError for a recipe without caches to study, or without the student or its number of steps.
    """
    if not recipe.study.caches:
        raise RecipeError("the recipe has no [study.caches]: see the shipped recipe study.toml")
    if STUDENT not in recipe.students:
        raise RecipeError(f"a study needs a student named {STUDENT!r}: add [students.{STUDENT}]")
    if recipe.student(STUDENT).epochs is not None:
        raise RecipeError(f"students.{STUDENT}.epochs: a study counts steps, the same for all of its caches: set steps")
    save_resolved(recipe, recipe.paths.recipe)
    seeds = recipe.study.seeds
    todo = [(arm, seed) for arm in arms(recipe) for seed in seeds if read_result(recipe, arm, seed) is None]
    if todo:
        if recipe.teacher.training is not None:
            teach(recipe)
        runs = _Runs(recipe)
        for arm, seed in todo:
            write_result(recipe, arm, seed, runs.result(arm, seed))
        if not read_teacher(recipe):
            write_teacher(recipe, runs.teacher_measures())
        if recipe.study.warm:
            runs.drop_starts()
    return summarise(recipe)


class _Runs:
    """The runs of a study, with its caches, each made when it is first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._first = recipe, next(iter(recipe.study.caches))
        self._teacher: Callable[[], Teacher] = functools.cache(lambda: teacher_of(recipe))
        self._cache = functools.cache(self._filled)

    def result(self, arm: Arm, seed: int) -> Result:
        """Train and measure one student; its weights are kept only as the start of others."""
        heldout, cache = self._heldout(), self._cache(arm.cache or self._first)
        paths, seconds = self._train(arm, seed)
        config = arm.student(self._recipe)
        placement = choose_placement(config.device, config.dtype)
        trust = config.trust_remote_code
        model = load_model(paths.final, placement, objective=heldout.objective, trust_remote_code=trust)
        rows = self._recipe.evaluation.batch_rows
        found = asdict(evaluate_student(model, heldout, batch_rows=rows, size=0, title=arm.name))
        step = config.step_rows * cache.row_length
        result = Result(
            identity=arm.identity(self._recipe, seed),
            teacher=str(heldout.manifest.identity["teacher"]["weights"]),
            measures={key: found[key] for key in _MEASURES},
            bytes_per_position=cache.bytes / max(cache.positions, 1) if arm.cache else None,
            kept_mass=_kept_mass(cache, arm.temperature) if arm.cache else None,
            tokens=config.steps * step,
            seconds_per_step=None if seconds is None else seconds / config.steps,
            curve=[(round(line["step"]) * step, line["ce"]) for line in read_metrics(paths.evaluations)],
        )
        if not (self._recipe.study.warm and arm.name == arm.labels_reference):
            shutil.rmtree(paths.final)
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
        return result

    def teacher_measures(self) -> dict[str, float]:
        """The teacher's line."""
        facts = read_json(cache_recipe(self._recipe, self._first).paths.teacher_facts, "delete it")
        found = asdict(evaluate_teacher(self._heldout(), facts))
        return {key: found[key] for key in _MEASURES}

    def drop_starts(self) -> None:
        """Remove the students that others have started from."""
        for folder in (self._recipe.run_dir / "runs").iterdir():
            shutil.rmtree(StudentPaths(folder).final, ignore_errors=True)

    def _train(self, arm: Arm, seed: int) -> tuple[StudentPaths, float | None]:
        """Train one student to the end, and the processor's seconds, None where it had begun before."""
        paths = StudentPaths(self._recipe.run_dir / "runs" / f"{arm.file_stem}-seed{seed}")
        config, cache = arm.student(self._recipe), self._cache(arm.cache or self._first)
        if arm.warm:
            start, _ = self._train(Arm("labels", mode="ce"), seed)
            config = config.model_copy(update={"architecture": None, "layers": None, "model": str(start.final)})
        elif config.layers is not None:
            self._link_start(paths)
        begun = paths.checkpoints.exists() or paths.final.exists()
        teacher = self._teacher() if arm.mode == "online" else None
        some = Subset(self._heldout(), np.arange(min(_CURVE_ROWS, len(self._heldout()))))
        heldout = some if config.eval_steps is not None else None
        start_seconds = time.process_time()
        name = f"{arm.name} seed {seed}"
        train_student(config, name, cache, paths.folder, seed=seed, teacher=teacher, heldout=heldout)
        return paths, None if begun else time.process_time() - start_seconds

    def _link_start(self, paths: StudentPaths) -> None:
        """Let a run start from the layers that the capture of the first cache exported, as every run does."""
        self._cache(self._first)
        origin = cache_recipe(self._recipe, self._first).paths.student(STUDENT)
        paths.folder.mkdir(parents=True, exist_ok=True)
        if not paths.start.exists():
            paths.start.symlink_to(origin.start.resolve(), target_is_directory=True)

    def _heldout(self) -> LogitCache:
        self._cache(self._first)
        return LogitCache(cache_recipe(self._recipe, self._first).paths.heldout)

    def _filled(self, name: str) -> LogitCache:
        own = cache_recipe(self._recipe, name)
        with suppress(IncompleteError):
            return LogitCache(own.paths.cache)
        prepare_corpus(own, teacher_tokenizer(self._recipe), max_positions(teacher_config(self._recipe)))
        fill_caches(own, self._teacher())
        export_for_students(own, self._teacher())
        return LogitCache(own.paths.cache)


_MEASURES = ("perplexity", "kl_to_teacher", "calibration_error", "acceptance", "agreement")


def _kept_mass(cache: LogitCache, temperature: float) -> float:
    """Mean mass of the heads of some rows at a temperature."""
    rows = np.unique(np.linspace(0, len(cache) - 1, min(_MASS_ROWS, len(cache))).astype(int))
    targets = cache.batch(rows)["targets"].flatten()
    log_tail = targets[targets.mask].at_temperature(temperature)[1]
    return float(1 - torch.exp(log_tail).mean())
