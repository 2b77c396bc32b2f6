"""`logit-cache compare`: students from one cache side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .extras import plots_extra


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or single students (RUN/students/NAME)")],
    output: Annotated[
        Path | None, typer.Option(help="write the figure, compare.png, or the page, compare.html")
    ] = None,
    any_cache: Annotated[bool, typer.Option("--any-cache", help="also students of different caches")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Print the settings and results of students side by side; with --output draw their curves or write a page."""
    from ..assess.compare import (
        check_comparable,
        comparison,
        comparison_page,
        draw_comparison,
        over_seeds,
        read_students,
    )
    from ..base.durable import write_bytes
    from .console import show, show_table

    students = read_students(runs)
    if not any_cache:
        check_comparable(students)
    rows = comparison(students)
    seeds = over_seeds(students)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        show_table(rows)
        if seeds:
            show("over seeds, mean ± half of the 95 % interval:")
            show_table(seeds)
    if output is not None:
        with plots_extra():
            from ..assess.figures import figure_png

        page = output.suffix == ".html"
        write_bytes(output, comparison_page(students) if page else figure_png(draw_comparison(students)))
        if not as_json:
            show(f"compare: {output}")
