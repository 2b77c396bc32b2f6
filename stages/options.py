"""Arguments that several commands share."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import RecipeError
from ..recipe.loading import load_recipe
from ..recipe.schema import Recipe

SHIPPED_RECIPES = Path(__file__).parent / "recipes"

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="recipe file, or the name of a shipped one")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="replace a value of the recipe, e.g. corpus.row_length=256"),
]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="directory or fsspec URL of a cache")]
StudentOption = Annotated[
    list[str] | None, typer.Option("--student", help="train only this one; may be given several times")
]
TaskOption = Annotated[int | None, typer.Option(min=0, help="number of this task, from 0")]
NumTasksOption = Annotated[int | None, typer.Option(min=1, help="number of tasks that share the work")]
AcceptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="FIELD",
        help="continue a cache whose teacher.source, teacher.revision or teacher.rows differs",
    ),
]


def task_of(task: int | None, num_tasks: int | None) -> tuple[int, int]:
    """The number of a task and of all tasks, by default 0 of 1. Raises RecipeError for numbers that do not fit."""
    if (task is None) != (num_tasks is None):
        raise RecipeError("--task and --num-tasks go together: give both or neither")
    share, shares = task or 0, num_tasks or 1
    if share >= shares:
        raise RecipeError(f"--task {share} is outside 0..{shares - 1} (--num-tasks {shares})")
    return share, shares


def read_recipe(path: str, overrides: list[str] | None) -> Recipe:
    """The recipe in a file or, by its bare name, one that ships with the commands (`demo`), with `--set` applied.

    Raises RecipeError where neither exists, and as `load_recipe` does.
    """
    return load_recipe(find_recipe(path), overrides)


def find_recipe(path: str) -> Path:
    """The file of a recipe given by path or by the bare name of a shipped one.

    Raises RecipeError where neither exists.
    """
    shipped = SHIPPED_RECIPES / f"{path}.toml"
    found = next((file for file in (Path(path), shipped) if file.is_file()), None)
    if found is None:
        names = sorted(file.stem for file in SHIPPED_RECIPES.glob("*.toml"))
        here = sorted(str(file) for file in Path(path).parent.glob("*.toml"))
        nearest = difflib.get_close_matches(path, [*names, *here], n=1, cutoff=0.7)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(names)}"
        what = f"{path!r} is a directory, not a recipe file" if Path(path).is_dir() else f"no recipe file {path!r}"
        raise RecipeError(f"{what}, and no shipped recipe of that name ({hint})")
    return found
