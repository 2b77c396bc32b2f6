"""`logit-cache import`: a cache from the log-probabilities of vLLM, SGLang or an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    files: Annotated[list[Path], typer.Argument(help="JSONL or Parquet files, or the directory of an export")],
    output: Annotated[str, typer.Option(help="directory of the cache to be written")],
    tokenizer: Annotated[str | None, typer.Option(help="directory or hub name of the tokenizer of the ids")] = None,
    form: Annotated[str, typer.Option("--format", help="auto, vllm, sglang, jsonl or parquet")] = "auto",
    k: Annotated[int | None, typer.Option(min=1, help="most candidates to keep of a position; by default all")] = None,
    row_length: Annotated[
        int | None, typer.Option(min=2, help="tokens per row; by default the longest sequence")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="size of the teacher's output layer, if larger than the tokenizer")
    ] = None,
    teacher: Annotated[str, typer.Option(help="name of the teacher in the cache's identity")] = "imported",
) -> None:
    """Make a cache of top-k log-probabilities; known at T = 1 only, unless they are an export."""
    from ..exchange.importing import import_cache

    import_cache(
        files,
        output,
        tokenizer=tokenizer,
        form=form,
        k=k,
        row_length=row_length,
        vocab_size=vocab_size,
        teacher=teacher,
    )
