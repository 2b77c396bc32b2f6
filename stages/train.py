"""`logit-cache train`: stage two, students from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_recipe, save_resolved
from pipeline.errors import RecipeError
from stages.options import RecipeArgument, SetOption


def train(
    recipe: RecipeArgument,
    student: Annotated[list[str] | None, typer.Option(help="train only this one; may be given several times")] = None,
    set_: SetOption = None,
) -> None:
    """Train the recipe's students from the cache; continues from the last checkpoint."""
    plan = load_recipe(recipe, set_)
    unknown = [name for name in student or [] if name not in plan.students]
    if unknown:
        raise RecipeError(f"no student {unknown[0]!r} in the recipe (there are: {', '.join(plan.students) or 'none'})")
    if not plan.students:
        raise RecipeError("the recipe has no student: add a [students.NAME] table")
    from pipeline.cache import LogitCache
    from pipeline.teacher import load_teacher, local_teacher
    from pipeline.training import train as train_student

    cache = LogitCache(plan.cache_dir)
    save_resolved(plan, plan.run_dir / "recipe.toml")
    for name in student or plan.students:
        config = plan.students[name]
        online = load_teacher(local_teacher(plan), plan.teacher) if config.mode == "online" else None
        train_student(config, name, cache, plan.student_dir(name), seed=plan.seed, teacher=online)
