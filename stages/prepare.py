"""`logit-cache prepare`: corpus text -> packed Arrow rows."""

from __future__ import annotations

from pipeline.config import load_recipe, save_resolved
from stages.options import RecipeArgument, SetOption


def prepare(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Turn text into packed rows, training and held-out."""
    plan = load_recipe(recipe, set_)
    from pipeline import models, teacher
    from pipeline.corpus import prepare_corpus

    source = teacher.local_teacher(plan)
    limit = models.max_positions(teacher.load_config(source, plan.teacher.revision))
    prepare_corpus(plan, teacher.load_tokenizer(source, plan.teacher.revision), limit)
    save_resolved(plan, plan.run_dir / "recipe.toml")
