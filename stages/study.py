"""`logit-cache study`: the same student from every kind of target, over several seeds."""

from __future__ import annotations

import io

from ..base.errors import RecipeError
from ..recipe.loading import save_resolved
from .options import RecipeArgument, SetOption, read_recipe


def study(recipe_path: RecipeArgument, set_: SetOption = None) -> None:
    """Train and evaluate every variant of the recipe's [study]; continues where it stopped.

    Prints a table and leaves run_dir/study.png. `make study` runs the one that ships.
    """
    recipe = read_recipe(recipe_path, set_)
    if not recipe.study.caches:
        raise RecipeError("the recipe has no [study.caches]: see the shipped recipe study.toml")
    if "student" not in recipe.students:
        raise RecipeError("a study needs a student named 'student': add [students.student]")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:  # said before hours of training
        raise RecipeError("the study's figure needs matplotlib: pip install 'logit-cache[plots]'") from error
    from ..base.durable import write_bytes
    from ..lab.study import draw, run_study, table
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher
    from .console import show, show_table

    save_resolved(recipe, recipe.paths.recipe)
    lines = run_study(recipe, lambda: load_teacher(resolve_teacher(recipe), recipe.teacher, recipe.corpus.objective))
    show_table(table(lines))
    show(
        "mean over seeds and half of the 95 % interval; gap closed: 0 % is the labels alone, 100 % the teacher beside the student"
    )
    buffer = io.BytesIO()
    draw(lines).savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes(recipe.run_dir / "study.png", buffer.getvalue())
    show(f"study: {recipe.run_dir / 'study.png'}")
