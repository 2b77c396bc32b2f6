"""`logit-cache systems`: the four known distillations side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import SetOption, read_recipe


def systems(
    recipes: Annotated[list[str] | None, typer.Argument(help="shipped recipes; by default all four")] = None,
    set_: SetOption = None,
) -> None:
    """Print the published figures of DistilGPT2, DistilBERT, DistilKoBERT and TinyBERT, and those of their runs."""
    from ..lab.systems import SYSTEMS, comparison
    from .console import show_table

    show_table(comparison({name: read_recipe(name, set_) for name in recipes or SYSTEMS}))
