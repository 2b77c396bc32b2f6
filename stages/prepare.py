"""`logit-cache prepare`: corpus text -> packed Arrow rows."""

from __future__ import annotations

from ..recipe.loading import save_resolved
from .options import RecipeArgument, SetOption, read_recipe


def prepare(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Turn text into packed rows, training and held-out."""
    recipe = read_recipe(recipe_path, set_)
    from ..corpus.prepare import prepare_corpus
    from ..models.loading import load_config, load_tokenizer, max_positions
    from ..models.teacher_source import resolve_teacher

    source = resolve_teacher(recipe)
    longest = max_positions(load_config(source, recipe.teacher.revision))
    prepare_corpus(recipe, load_tokenizer(source, recipe.teacher.revision), longest)
    save_resolved(recipe, recipe.paths.recipe)
