"""`logit-cache bench`: speed, memory and size on this machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..base.errors import RecipeError
from .options import RecipeArgument, SetOption, read_recipe

PARTS = ("capture", "read", "step", "help")


def bench(
    recipe_path: RecipeArgument,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every figure and its runs")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(PARTS)}; may be given several times")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each job is run")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="rows of the corpus to measure on")] = 64,
    scale: Annotated[
        bool, typer.Option("--scale", help="instead, how cost grows with the number of rows and shards")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Measure what caching costs and saves here; needs the teacher, and the rows of `prepare`."""
    recipe = read_recipe(recipe_path, set_)
    unknown = [part for part in only or [] if part not in PARTS]
    if unknown:
        raise RecipeError(f"--only {unknown[0]!r}: one of {', '.join(PARTS)}")
    from rich.table import Table

    from ..base.durable import write_json
    from ..base.progress import console
    from .console import show

    if recipe.corpus.objective != "causal":
        raise RecipeError("bench measures causal rows: corpus.objective is 'masked' in this recipe")
    if scale:
        from ..lab.scale import curves

        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=recipe.run_dir) as scratch:
            found = curves(Path(scratch))
        table = Table("figure", "by size")
        for name, curve in found.items():
            table.add_row(name, "  ".join(f"{size:,}: {_number(value)}" for size, value in curve.items()))
        console.print(table, markup=False)
        if json_ is not None:
            write_json(json_, found)
            show(f"bench: {json_}")
        return
    from ..lab.bench import bench
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher

    teacher = load_teacher(resolve_teacher(recipe), recipe.teacher)
    report = bench(recipe, teacher, rounds=rounds, rows=rows, parts=tuple(only or PARTS))
    machine = report.machine
    table = Table("figure", "median", "runs", title=f"{machine['cpu']}, {machine['threads']} threads")
    for name, runs in report.runs.items():
        table.add_row(name, _number(report[name]), "  ".join(_number(run) for run in runs[:8]))
    console.print(table, markup=False)
    if json_ is not None:
        write_json(json_, report.to_json())
        show(f"bench: {json_}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
