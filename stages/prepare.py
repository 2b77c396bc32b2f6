"""`logit-cache prepare`: corpus text -> packed Arrow rows."""

from __future__ import annotations

from ..recipe.loading import save_resolved
from .options import RecipeArgument, SetOption, read_recipe


def prepare(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Turn text into packed rows, training and held-out."""
    recipe = read_recipe(recipe_path, set_)
    from ..base import processes

    if processes.rank() == 0:
        from ..corpus.prepare import prepare_corpus
        from ..models.loading import max_positions
        from ..models.teacher_source import teacher_config, teacher_tokenizer

        config = teacher_config(recipe)
        vocab_size = getattr(config.get_text_config(), "vocab_size", None)
        prepare_corpus(recipe, teacher_tokenizer(recipe), max_positions(config), vocab_size)
        save_resolved(recipe, recipe.paths.recipe)
    processes.wait_for_all()
