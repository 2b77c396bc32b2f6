"""`logit-cache resize`: a recipe that takes so many minutes on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .options import RecipeArgument, SetOption, read_recipe


def resize(
    recipe_path: RecipeArgument,
    minutes: Annotated[float, typer.Option(min=0.1, help="for prepare, cache, train, evaluate and report together")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="the recipe to write")],
    set_: SetOption = None,
) -> None:
    """Write a recipe with as many rows and steps as this machine can do in so many minutes, at most the recipe's own.

    Teacher and student are timed on a few rows. A file that is there already is kept.
    """
    begun = time.monotonic()
    recipe = read_recipe(recipe_path, set_)
    from ..base.progress import duration
    from ..recipe.loading import save_resolved
    from .console import show

    if output.exists():
        show(f"resize: {output} is there already")
        return
    from ..lab.resize import measure_speeds, resized, run_seconds

    speeds = measure_speeds(recipe, begun)
    # What was measured is part of the minutes.
    small = resized(recipe, speeds, 60 * minutes - (time.monotonic() - begun))
    save_resolved(small, output)
    step = next(iter(small.students.values()))
    show(
        f"resize: {output}: {small.corpus.max_rows} of {recipe.corpus.max_rows} rows, {step.steps} steps; expected "
        f"{duration(run_seconds(small, speeds))} of {duration(60 * minutes)} "
        f"(teacher {1 / speeds.teacher:,.0f} tokens/s, student {1 / speeds.student:,.0f} here)"
    )
