"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="recipe file, or the name of a shipped one")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="replace a value of the recipe, e.g. corpus.row_length=256"),
]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="directory of a cache")]
