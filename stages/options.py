"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import RecipeError
from ..recipe.schema import Recipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="recipe file, or the name of a shipped one")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="replace a value of the recipe, e.g. corpus.row_length=256"),
]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="directory or fsspec URL of a cache")]
StudentOption = Annotated[
    list[str] | None, typer.Option("--student", help="train only this one; may be given several times")
]


AcceptOption = Annotated[
    list[str] | None,
    typer.Option("--accept", metavar="FIELD", help="continue a cache whose teacher.source or teacher.revision differs"),
]


def chosen_students(plan: Recipe, names: list[str] | None) -> list[str]:
    """The students that a command is about: those named, else all. Raises RecipeError for one that is not there."""
    unknown = [name for name in names or [] if name not in plan.students]
    if unknown:
        raise RecipeError(f"no student {unknown[0]!r} in the recipe (there are: {', '.join(plan.students) or 'none'})")
    return names or list(plan.students)
