"""`logit-cache study`: the same student from every kind of target, over several seeds."""

from __future__ import annotations

from .extras import plots_extra
from .options import RecipeArgument, SetOption, read_recipe


def study(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Train and evaluate every variant of the recipe's [study]; continues where it stopped.

    Prints a table and leaves run_dir/study.png. `make study` runs the one that ships.
    """
    recipe = read_recipe(recipe_path, set_)
    with plots_extra():  # before hours of training
        from ..assess.figures import figure_png
    from ..base.durable import write_bytes
    from ..lab.study import draw, run_study, table
    from .console import show, show_table

    lines = run_study(recipe)
    show_table(table(lines))
    show("mean over seeds and half of the 95 % interval; gap closed: 0 % is labels alone, 100 % online distillation")
    write_bytes(recipe.run_dir / "study.png", figure_png(draw(lines)))
    show(f"study: {recipe.run_dir / 'study.png'}")
