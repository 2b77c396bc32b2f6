"""`logit-cache train`: stage two, students from the cache."""

from __future__ import annotations

from pipeline.config import load_recipe, save_resolved
from pipeline.errors import RecipeError
from stages.options import RecipeArgument, SetOption, StudentOption, chosen_students


def train(
    recipe: RecipeArgument,
    student: StudentOption = None,
    set_: SetOption = None,
) -> None:
    """Train the recipe's students from the cache; continues from the last checkpoint."""
    plan = load_recipe(recipe, set_)
    names = chosen_students(plan, student)
    if not plan.students:
        raise RecipeError("the recipe has no student: add a [students.NAME] table")
    from pipeline.cache import LogitCache
    from pipeline.teacher import load_teacher, local_teacher
    from pipeline.training import train as train_student

    cache = LogitCache(plan.cache_dir)
    save_resolved(plan, plan.run_dir / "recipe.toml")
    for name in names:
        config = plan.students[name]
        online = (
            load_teacher(local_teacher(plan), plan.teacher, plan.corpus.objective) if config.mode == "online" else None
        )
        train_student(config, name, cache, plan.student_dir(name), seed=plan.seed, teacher=online)
