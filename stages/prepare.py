"""`logit-cache prepare`: corpus text -> packed Arrow rows."""

from __future__ import annotations

from ..recipe.loading import load_recipe, save_resolved
from .options import RecipeArgument, SetOption


def prepare(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Turn text into packed rows, training and held-out."""
    plan = load_recipe(recipe, set_)
    from ..corpus.prepare import prepare_corpus
    from ..models.loading import load_config, load_tokenizer, max_positions
    from ..models.teacher_source import resolve_teacher

    source = resolve_teacher(plan)
    limit = max_positions(load_config(source, plan.teacher.revision))
    prepare_corpus(plan, load_tokenizer(source, plan.teacher.revision), limit)
    save_resolved(plan, plan.paths.recipe)
