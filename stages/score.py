"""`logit-cache score`: any model against a cache, without the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .extras import plots_extra
from .options import CacheArgument


def score(
    cache: CacheArgument,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="directories, hub names or GGUF files; quantised ones too")
    ],
    rows: Annotated[
        int | None, typer.Option(min=1, help="score on so many rows, drawn by --seed; by default all")
    ] = None,
    seed: Annotated[int, typer.Option(help="which rows are drawn")] = 0,
    batch_rows: Annotated[int, typer.Option(min=1, help="rows per forward pass")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="precision of the forward pass; by default that of the teacher")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run the Python code that a model brings")] = False,
    output: Annotated[Path | None, typer.Option(help="write the page here, e.g. score.html")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every figure")] = None,
) -> None:
    """Measure how far models are from the cache's teacher, with the error of each figure; the teacher is not loaded."""
    from ..assess.score import by_position, note, score_models, score_page, table
    from ..base.durable import write_bytes, write_json
    from ..store.reader import LogitCache
    from .console import show, show_table

    if output is not None:
        with plots_extra():  # before the models run
            from ..assess import figures  # noqa: F401
    scores = score_models(
        LogitCache(cache),
        models,
        rows=rows,
        seed=seed,
        batch_rows=batch_rows,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    show_table(table(scores))
    show("by position:")
    show_table(by_position(scores))
    show(note(scores))
    if json_ is not None:
        write_json(json_, scores.to_json())
        show(f"score: {json_}")
    if output is not None:
        write_bytes(output, score_page(scores))
        show(f"score: {output}")
