"""`logit-cache evaluate`: students and teacher side by side on held-out rows."""

from __future__ import annotations

from .options import RecipeArgument, SetOption, read_recipe


def evaluate(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Compare the trained students with the teacher on the held-out cache."""
    recipe = read_recipe(recipe_path, set_)
    from ..assess.evaluation import evaluate_run, table
    from .console import show_table

    show_table(table(evaluate_run(recipe)))
