"""`logit-cache compare`: students from one cache side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .extras import plots_extra


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or single students (RUN/students/NAME)")],
    output: Annotated[Path | None, typer.Option(help="write the figure here, e.g. compare.png")] = None,
    any_cache: Annotated[bool, typer.Option("--any-cache", help="also students of different caches")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Print the settings and results of students side by side; with --output draw their curves."""
    from ..assess.compare import check_comparable, comparison, draw_comparison, read_students
    from ..base.durable import write_bytes
    from .console import show, show_table

    students = read_students(runs)
    if not any_cache:
        check_comparable(students)
    rows = comparison(students)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        show_table(rows)
    if output is not None:
        with plots_extra():
            from ..assess.figures import figure_png

        write_bytes(output, figure_png(draw_comparison(students)))
        if not as_json:
            show(f"compare: {output}")
