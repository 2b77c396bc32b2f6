"""`logit-cache report`: figures and one self-contained page."""

from __future__ import annotations

from .extras import plots_extra
from .options import RecipeArgument, SetOption, read_recipe


def report(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Draw the figures and write the page."""
    recipe = read_recipe(recipe_path, set_)
    from ..assess.evaluation import read_results, table
    from .console import show, show_table

    with plots_extra():
        from ..assess.report import write_report

    page = write_report(recipe)
    show_table(table(read_results(recipe)))
    show(f"report: {page}")
