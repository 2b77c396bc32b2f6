"""`logit-cache bench`: speed, memory and size on this machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..lab.bench_result import PARTS
from .options import RecipeArgument, SetOption, read_recipe


def bench(
    recipe_path: RecipeArgument,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every figure and its runs")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(PARTS)}; may be given several times")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="number of runs of each job")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="rows of the corpus to measure on")] = 64,
    scale: Annotated[
        bool, typer.Option("--scale", help="instead, cost against the number of rows, shards and processes")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Measure the cost and the savings of caching here; needs the teacher, and the rows of `prepare`."""
    recipe = read_recipe(recipe_path, set_)
    from rich.table import Table

    from ..base.durable import write_json
    from ..base.progress import console
    from .console import show

    figures: dict[str, Any]
    if scale:
        from ..lab.scale import curves

        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=recipe.run_dir) as scratch:
            figures = curves(Path(scratch))
        table = Table("figure", "by size")
        for name, curve in figures.items():
            table.add_row(name, "  ".join(f"{size:,}: {_number(value)}" for size, value in curve.items()))
    else:
        from ..lab.bench import bench

        result = bench(recipe, rounds=rounds, rows=rows, parts=tuple(only or PARTS))
        figures = result.to_json()
        machine = result.machine
        table = Table("figure", "median", "runs", title=f"{machine['cpu']}, {machine['threads']} threads")
        for name, runs in result.runs.items():
            table.add_row(name, _number(result[name]), "  ".join(_number(run) for run in runs[:8]))
    console.print(table, markup=False)
    if json_ is not None:
        write_json(json_, figures)
        show(f"bench: {json_}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
