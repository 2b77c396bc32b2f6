"""`logit-cache import`: a cache from log-probabilities that vLLM, SGLang or an export hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    files: Annotated[list[Path], typer.Argument(help="JSONL or Parquet files, or the directory of an export")],
    output: Annotated[str, typer.Option(help="directory of the cache to be written")],
    tokenizer: Annotated[str | None, typer.Option(help="directory or hub name of what made the token ids")] = None,
    form: Annotated[str, typer.Option("--format", help="auto, vllm, sglang, jsonl or parquet")] = "auto",
    k: Annotated[
        int | None, typer.Option(min=1, help="candidates to keep; by default the fewest of any position")
    ] = None,
    row_length: Annotated[
        int | None, typer.Option(min=2, help="tokens per row; by default the longest sequence")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="the teacher's output layer, where larger than the tokenizer")
    ] = None,
    teacher: Annotated[str, typer.Option(help="what to call the teacher in the cache's identity")] = "imported",
) -> None:
    """Make a cache of top-k log-probabilities; known at T = 1 only, unless they are an export."""
    from ..base.errors import RecipeError
    from ..exchange.importing import IMPORTS, import_cache

    if form not in IMPORTS:
        raise RecipeError(f"--format {form!r}: one of {', '.join(IMPORTS)}")
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
