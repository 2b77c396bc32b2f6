"""`logit-cache evaluate`: students and teacher side by side on held-out rows."""

from __future__ import annotations

from ..recipe.loading import load_recipe
from .options import RecipeArgument, SetOption


def evaluate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Compare the trained students with the teacher, which is known from its held-out cache."""
    plan = load_recipe(recipe, set_)
    from ..assess.evaluation import evaluate_run, table
    from .console import show_table

    show_table(table(evaluate_run(plan)))
