"""`logit-cache study`: the same student from every kind of target, over several seeds."""

from __future__ import annotations

from typing import Annotated

import typer

from .extras import plots_extra
from .options import RecipeArgument, SetOption, read_recipe


def study(
    recipe_path: RecipeArgument,
    train: Annotated[
        bool, typer.Option("--train/--table", help="do the missing runs, or only show the results that are there")
    ] = True,
    set_: SetOption = None,
) -> None:
    """Train and evaluate every arm of the recipe's [study]; continues where it stopped, with the results that are there.

    Prints a table and leaves gap.png and curves.png beside the results (study.results of the recipe). `make study` runs
    the one that ships.
    """
    recipe = read_recipe(recipe_path, set_)
    with plots_extra():  # before hours of training
        from ..assess.figures import figure_png
    from ..base.durable import write_bytes
    from ..lab.study import run_study
    from ..lab.study_figures import draw_curves, draw_gap
    from ..lab.study_results import results_folder, summarise, table
    from .console import show, show_table

    found = run_study(recipe) if train else summarise(recipe)
    show_table(table(found))
    show(
        "mean over seeds and half of the 95 % interval. gap closed: 0 % is labels alone, 100 % online distillation, of the "
        "same seed; kept: mass of the head at the arm's temperature; bytes: a position in the shards; s/step: of the "
        "processor"
    )
    if found.missing:
        show(f"study: {found.missing} runs are missing: `logit-cache study {recipe_path}` does them")
    if found.teachers > 1:
        show(
            f"study: these results are of {found.teachers} teachers, each made on another machine from the same settings"
        )
    if not any("gap_closed" in line.values for line in found.lines):
        show("study: no figures yet: they need labels alone and online distillation of the same seed")
        return
    folder = results_folder(recipe)
    for name, figure in (("gap", draw_gap(found)), ("curves", draw_curves(found))):
        write_bytes(folder / f"{name}.png", figure_png(figure))
    show(f"study: {folder / 'gap.png'}, {folder / 'curves.png'}")
