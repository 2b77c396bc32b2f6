"""`logit-cache inspect`: what a cache holds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .options import CacheArgument


def inspect(
    cache: CacheArgument,
    row: Annotated[int | None, typer.Option(help="show this row as text with the teacher's candidates")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what is in a cache, or one row with the teacher's ten best candidates per position."""
    from rich.table import Column, Table

    from ..assess.inspection import cache_facts, row_facts
    from ..base.progress import console
    from ..store.reader import LogitCache

    opened = LogitCache(cache, partial=True)
    if row is None:
        facts = cache_facts(opened)
        # Digests are folded, never cut: they are there to be compared.
        table = Table("", Column(overflow="fold"), title=str(cache), show_header=False)
        for key, value in facts.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            table.add_row(key, f"{text:,}" if isinstance(text, int) and not isinstance(text, bool) else str(text))
    else:
        facts = row_facts(opened, row)
        columns = "position", "token", "next, its probability", "the teacher's candidates and their probability"
        table = Table(*columns, title=f"row {row}{_loss(facts)}")
        documents = {document["first_position"]: document for document in facts["documents"]}
        for line in facts["positions"]:
            if line["position"] in documents and len(documents) > 1:
                table.add_section()
                number = list(documents).index(line["position"])
                table.add_row("", "", "", f"document {number}{_loss(documents[line['position']])}")
            candidates = "  ".join(f"{text!r} {p:.3f}" for text, p in line["candidates"])
            following = "" if line["next"] is None else repr(line["next"])
            following += "" if line["next_probability"] is None else f" {line['next_probability']:.3g}"
            table.add_row(str(line["position"]), repr(line["token"]), following, candidates)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        console.print(table, markup=False)


def _loss(facts: dict[str, Any]) -> str:
    loss = facts["teacher_loss"]
    return "" if loss is None else f": the teacher's loss is {loss:.3f} nats per label"
