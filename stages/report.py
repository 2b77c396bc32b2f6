"""`logit-cache report`: figures and one self-contained page."""

from __future__ import annotations

from ..base.errors import RecipeError
from ..recipe.loading import load_recipe
from .options import RecipeArgument, SetOption


def report(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Draw the figures and write the page."""
    plan = load_recipe(recipe, set_)
    from ..assess.evaluation import read_results, table
    from .console import show, show_table

    try:
        from ..assess.report import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise RecipeError(f"the report needs {error.name}: pip install 'logit-cache[plots]'") from error

    page = write_report(plan)
    show_table(table(read_results(plan)))
    show(f"report: {page}")
