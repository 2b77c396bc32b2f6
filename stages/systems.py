"""`logit-cache systems`: the four known distillations side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import SetOption, read_recipe

SHIPPED = ["distilgpt2", "distilbert", "distilkobert", "tinybert4"]


def systems(
    recipes: Annotated[list[str] | None, typer.Argument(help="shipped recipes; by default all four")] = None,
    set_: SetOption = None,
) -> None:
    """Print what is published of DistilGPT2, DistilBERT, DistilKoBERT and TinyBERT, and what their runs here gave."""
    names = recipes or SHIPPED
    plans = {name: read_recipe(name, set_) for name in names}
    from ..base.errors import RecipeError
    from ..lab.systems import SYSTEMS, comparison
    from .console import show_table

    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise RecipeError(f"{unknown[0]!r} is none of the known systems: {', '.join(SYSTEMS)}")
    show_table(comparison(plans))
