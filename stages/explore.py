"""`logit-cache explore`: rows of a cache as a page to read, with the candidates at every token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import CacheArgument


def explore(
    cache: CacheArgument,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL_OR_RUN]...",
            help="models beside the teacher: a run, RUN/students/NAME, a directory, a hub name",
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="0,5,9-12; spread:N over the cache; worst:N by teacher's loss")
    ] = "spread:24",
    output: Annotated[Path, typer.Option(help="the page")] = Path("explorer.html"),
    device: Annotated[str, typer.Option(help="of the models: auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Write one page that shows what the teacher, and models beside it, predict at every token of some rows."""
    from ..assess.beside import load_beside, named_models
    from ..assess.chosen_rows import chosen_rows
    from ..assess.explore import explore_rows
    from ..assess.explore_page import explorer_page
    from ..base.durable import write_bytes
    from ..models.placement import choose_placement
    from ..store.reader import LogitCache
    from .console import show

    opened = LogitCache(cache, partial=True)
    chosen = chosen_rows(opened, rows)
    places = named_models(models or [])
    placement = choose_placement(device)
    if places:
        show(f"explore: {', '.join(places)} on {placement}")
    explored = explore_rows(opened, chosen, load_beside(opened, places, placement))
    page = explorer_page(explored).encode()
    write_bytes(output, page)
    show(f"explore: {output}, {len(chosen)} rows, {len(page) / 1e6:.1f} MB")
