"""`logit-cache export`: a cache as files that other trainers read."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import CacheArgument


def export(
    cache: CacheArgument,
    output: Annotated[str, typer.Argument(help="directory to write, which must not exist")],
    form: Annotated[str, typer.Option("--format", help="parquet, jsonl or axolotl")] = "parquet",
    temperature: Annotated[float, typer.Option(help="softmax temperature of the axolotl columns")] = 1.0,
) -> None:
    """Write a cache as Parquet or JSON lines with list columns, or as the columns of Axolotl's KD trainer."""
    from ..exchange.export import export_cache
    from ..store.reader import LogitCache

    export_cache(LogitCache(cache), output, form, temperature=temperature)
