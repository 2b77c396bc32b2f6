"""`logit-cache gpu-check`: what a GPU computes, and what both stages cost on it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer


def gpu_check(
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write everything measured, after each section")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a section, such as supports or step-1B; may be given several times")
    ] = None,
) -> None:
    """Check a GPU against the CPU and measure both stages on it, on models of random weights; needs no network.

    Without a GPU it is a dry run on tiny shapes.
    """
    from rich.table import Table

    from ..base.durable import write_json
    from ..base.errors import CorruptError
    from ..base.progress import console
    from ..lab.gpu_check import check_gpu
    from .console import show

    def report(result: dict[str, Any]) -> None:
        name, found = next(reversed(result["sections"].items()))
        show(f"gpu-check: {name}: {found.get('error') or 'done'} in {found['seconds']:.1f} s")
        if json_ is not None:
            write_json(json_, result)

    with TemporaryDirectory() as folder:
        result = check_gpu(Path(folder), only or (), report)
    if json_ is not None:
        write_json(json_, result)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number is not None)
    dry = "DRY RUN without a GPU: no figure means anything. " if result["dry_run"] else ""
    table = Table("figure", "measured", "must", "aim", title=f"{dry}{result['device']}, {versions}")
    for name, figure in result["figures"].items():
        value = figure["value"]
        table.add_row(name, "" if value is None else f"{value:.4g}", f"{figure['must']:g}", f"{figure['aim']:g}")
    console.print(table, markup=False)
    if result["wrong"]:
        raise CorruptError(f"gpu-check: not right on this device: {'; '.join(result['wrong'])[:2000]}")
    show(f"gpu-check: all right, {result['seconds']:.0f} s{'' if json_ is None else f', {json_}'}")
