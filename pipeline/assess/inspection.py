"""What a cache holds: its facts, and one of its rows as text."""

from __future__ import annotations

from typing import Any

from ..base.errors import RecipeError
from ..corpus.labels import IGNORE
from ..models.loading import load_tokenizer
from ..store.reader import LogitCache

CANDIDATES = 10


def cache_facts(cache: LogitCache) -> dict[str, Any]:
    """Size, completeness, settings and identity of a cache, ready for JSON. `bytes` does not count the corpus."""
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


def row_text(cache: LogitCache, row: int) -> list[dict[str, Any]]:
    """Position by position: its token, the next token or None, and the best (text, probability) candidates.

    Raises RecipeError for a row that is not committed.
    """
    if not 0 <= row < len(cache):
        raise RecipeError(f"--row {row} is outside 0..{len(cache) - 1}, the committed rows of {cache.path}")
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    item = cache[row]
    targets = item["targets"]
    # By weight: a sample stands for more than its own probability, and unused entries have weight 0.
    weights_LK, order_LK = targets.weights.sort(dim=-1, descending=True, stable=True)
    ids_LK = targets.token_ids.gather(-1, order_LK)[:, :CANDIDATES]
    lines: list[dict[str, Any]] = []
    for position, (token, label) in enumerate(zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True)):
        candidates = []
        if targets.mask[position]:
            best = zip(ids_LK[position].tolist(), weights_LK[position, :CANDIDATES].tolist(), strict=True)
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
