"""`logit-cache teach`: the teacher itself, where there is none."""

from __future__ import annotations

from ..recipe.loading import load_recipe
from .options import RecipeArgument, SetOption


def teach(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Train the recipe's teacher on its text; continues from the last checkpoint."""
    plan = load_recipe(recipe, set_)
    from ..lab.teaching import teach as teach_teacher

    teach_teacher(plan)
