"""`logit-cache teach`: a teacher trained on the recipe's text."""

from __future__ import annotations

from .options import RecipeArgument, SetOption, read_recipe


def teach(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Train the recipe's teacher on its text; continues from the last checkpoint."""
    recipe = read_recipe(recipe_path, set_)
    from ..lab.teaching import teach as teach_teacher

    teach_teacher(recipe)
