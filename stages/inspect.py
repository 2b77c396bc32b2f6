"""`logit-cache inspect`: what a cache holds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..base.errors import RecipeError
from .options import CacheArgument


def inspect(
    cache: CacheArgument,
    row: Annotated[int | None, typer.Option(help="show this row as text with the teacher's candidates")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what is in a cache, or one row with the teacher's ten best candidates per position."""
    from rich.table import Table

    from ..base.progress import console
    from ..store.reader import LogitCache

    opened = LogitCache(cache, partial=True)
    if row is not None:
        if not 0 <= row < len(opened):
            raise RecipeError(f"--row {row} is outside 0..{len(opened) - 1}, the committed rows of {cache}")
        positions = _positions(opened, row)
        if as_json:
            print(json.dumps({"row": row, "positions": positions}, ensure_ascii=False))
            return
        table = Table("position", "token", "next", "the teacher's candidates and their probability", title=f"row {row}")
        for line in positions:
            candidates = "  ".join(f"{text!r} {p:.3f}" for text, p in line["candidates"])
            following = "" if line["next"] is None else repr(line["next"])
            table.add_row(str(line["position"]), repr(line["token"]), following, candidates)
        console.print(table, markup=False)
        return
    facts = summary(opened)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    table = Table("", "", title=str(cache), show_header=False)
    for key, value in facts.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        table.add_row(key, f"{shown:,}" if isinstance(shown, int) and not isinstance(shown, bool) else str(shown))
    console.print(table, markup=False)


def summary(cache: object) -> dict[str, Any]:
    """The numbers of a cache."""
    from ..store.reader import LogitCache

    assert isinstance(cache, LogitCache)
    manifest = cache.manifest
    return {
        "complete": cache.complete,
        "rows": len(cache),
        "row_length": cache.row_length,
        "positions": cache.positions,
        "shards": len(cache.records),
        "shards_planned": manifest.num_shards,
        "bytes": cache.bytes,
        "bytes_per_position": round(cache.bytes / max(cache.positions, 1), 2),
        "vocab_size": cache.vocab_size,
        "support": manifest.identity["support"],
        "knots": list(manifest.codec.knots),
        "objective": manifest.objective,
        "signals": {signal.name: signal.codec for signal in manifest.signals},
        "teacher": manifest.identity["teacher"],
        "teacher_loss": round(cache.teacher_loss, 4),
        "identity": manifest.digest,
    }


def _positions(cache: object, row: int) -> list[dict[str, Any]]:
    """One row, position by position, as text."""
    from ..corpus.labels import IGNORE
    from ..models.loading import load_tokenizer
    from ..store.reader import LogitCache

    assert isinstance(cache, LogitCache)
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    item = cache[row]
    targets = item["targets"]
    # A sample stands for more than its own probability; entries that are not used weigh nothing and stand last.
    weights, order = targets.weights.sort(dim=-1, descending=True, stable=True)
    best_ids = targets.token_ids.gather(-1, order)[:, :10]
    lines: list[dict[str, Any]] = []
    for position, token in enumerate(item["input_ids"].tolist()):
        label = int(item["labels"][position])
        candidates = []
        if targets.mask[position]:
            best = zip(best_ids[position].tolist(), weights[position, :10].tolist(), strict=True)
            candidates = [(tokenizer.decode([token_id]), round(p, 4)) for token_id, p in best if token_id >= 0]
        lines.append(
            {
                "position": position,
                "token": tokenizer.decode([token]),
                "next": None if label == IGNORE else tokenizer.decode([label]),
                "candidates": candidates,
            }
        )
    return lines
