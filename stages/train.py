"""`logit-cache train`: stage two, students from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import IncompleteError, RecipeError
from ..recipe.loading import save_resolved
from .options import RecipeArgument, SetOption, StudentOption, chosen_students, read_recipe


def train(
    recipe_path: RecipeArgument,
    student: StudentOption = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="train on the shards that are there, where the cache is not complete")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Train the recipe's students from the cache; continues from the last checkpoint."""
    recipe = read_recipe(recipe_path, set_)
    names = chosen_students(recipe, student)
    if not recipe.students:
        raise RecipeError("the recipe has no student: add a [students.NAME] table")
    from ..distill.stage_two import train as train_student
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher
    from ..store.reader import LogitCache
    from .console import show

    cache = LogitCache(recipe.paths.cache, partial=partial)
    if not len(cache):
        raise IncompleteError(f"{cache.path}: no shard is committed yet: wait for the first one of `logit-cache cache`")
    if not cache.complete:
        show(f"train: {cache.path} is not complete: {len(cache):,} of {cache.manifest.rows:,} rows")
    save_resolved(recipe, recipe.paths.recipe)
    for name in names:
        config = recipe.students[name]
        online = (
            load_teacher(resolve_teacher(recipe), recipe.teacher, recipe.corpus.objective)
            if config.mode == "online"
            else None
        )
        train_student(config, name, cache, recipe.paths.student(name).folder, seed=recipe.seed, teacher=online)
