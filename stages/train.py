"""`logit-cache train`: stage two, students from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_recipe, save_resolved
from pipeline.errors import IncompleteError, RecipeError
from stages.options import RecipeArgument, SetOption, StudentOption, chosen_students


def train(
    recipe: RecipeArgument,
    student: StudentOption = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="train on the shards that are there, where the cache is not complete")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Train the recipe's students from the cache; continues from the last checkpoint."""
    plan = load_recipe(recipe, set_)
    names = chosen_students(plan, student)
    if not plan.students:
        raise RecipeError("the recipe has no student: add a [students.NAME] table")
    from pipeline.cache import LogitCache
    from pipeline.progress import say
    from pipeline.teacher import load_teacher, local_teacher
    from pipeline.training import train as train_student

    cache = LogitCache(plan.cache_dir, partial=partial)
    if not len(cache):
        raise IncompleteError(f"{cache.path}: no shard is committed yet: wait for the first one of `logit-cache cache`")
    if not cache.complete:
        say(f"train: {cache.path} is not complete: {len(cache):,} of {cache.manifest.rows:,} rows")
    save_resolved(plan, plan.run_dir / "recipe.toml")
    for name in names:
        config = plan.students[name]
        online = (
            load_teacher(local_teacher(plan), plan.teacher, plan.corpus.objective) if config.mode == "online" else None
        )
        train_student(config, name, cache, plan.student_dir(name), seed=plan.seed, teacher=online)
