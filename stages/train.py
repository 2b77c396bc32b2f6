"""`logit-cache train`: stage two, students from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from ..distill import run
from .options import RecipeArgument, SetOption, StudentOption, read_recipe


def train(
    recipe_path: RecipeArgument,
    student: StudentOption = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="train on the committed shards of an incomplete cache")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Train the recipe's students from the cache; continues from the last checkpoint."""
    run(read_recipe(recipe_path, set_), student, partial)
