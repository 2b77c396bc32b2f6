"""What a cache holds: its facts, and one of its rows as text."""

from __future__ import annotations

from typing import Any

import torch

from ..base.errors import RecipeError
from ..corpus.labels import IGNORE, PADDING
from ..models.loading import load_tokenizer
from ..store.batch import Batch
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
        "label_log_probs": manifest.codec.label_log_probs,
        "objective": manifest.objective,
        "row_start": _row_start(cache),
        "signals": {signal.name: signal.codec for signal in manifest.signals},
        "teacher": manifest.identity["teacher"],
        "teacher_loss": round(cache.teacher_loss, 4),
        "identity": manifest.digest,
    }


def _row_start(cache: LogitCache) -> str | None:
    """The text with which rows begin that continue a document, such as a BOS; None without."""
    ids = cache.manifest.identity.get("row_start", [])
    return load_tokenizer(str(cache.tokenizer_dir)).decode(ids) if ids else None


def row_facts(cache: LogitCache, row: int) -> dict[str, Any]:
    """A row as text: for each position its token, the next token and the teacher's probability of it, and the best
    (text, probability) candidates. The teacher's loss on the row and on each of its documents, mean per label in nats.

    None stands where there is no label, and where the cache does not keep log-probabilities of labels. Raises RecipeError for a row that is not committed.
    """
    if not 0 <= row < len(cache):
        raise RecipeError(f"--row {row} is outside 0..{len(cache) - 1}, the committed rows of {cache.path}")
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    item = cache[row]
    targets, labels = item["targets"], item["labels"].tolist()
    of_labels = targets.label_log_probs
    # By weight: a sample stands for more than its own probability, and unused entries have weight 0.
    weights_LK, order_LK = targets.weights.sort(dim=-1, descending=True, stable=True)
    ids_LK = targets.token_ids.gather(-1, order_LK)[:, :CANDIDATES]
    lines: list[dict[str, Any]] = []
    for position, (token, label) in enumerate(zip(item["input_ids"].tolist(), labels, strict=True)):
        candidates = []
        if targets.mask[position]:
            best = zip(ids_LK[position].tolist(), weights_LK[position, :CANDIDATES].tolist(), strict=True)
            candidates = [(tokenizer.decode([token_id]), round(p, 4)) for token_id, p in best if token_id >= 0]
        lines.append(
            {
                "position": position,
                "token": tokenizer.decode([token]),
                "next": None if label == IGNORE else tokenizer.decode([label]),
                "next_probability": None
                if label == IGNORE or of_labels is None or not targets.mask[position]
                else float(f"{float(of_labels[position].exp()):.4g}"),
                "candidates": candidates,
            }
        )
    loss = None if of_labels is None else round(float(cache.teacher_losses([row])[0]), 4)
    return {"row": row, "teacher_loss": loss, "documents": _document_losses(item), "positions": lines}


def _document_losses(item: Batch) -> list[dict[str, Any]]:
    """First position, number of labels and the teacher's loss of each document of a row."""
    targets, segments, documents = item["targets"], item["segment_ids"], []
    for document in torch.unique(segments).tolist():
        here = segments == document
        labels = here & (item["labels"] != IGNORE) & targets.mask
        loss = None
        if targets.label_log_probs is not None and labels.any():
            loss = round(float(-targets.label_log_probs[labels].double().mean()), 4)
        if document != PADDING:
            first = int(torch.nonzero(here)[0])
            documents.append({"first_position": first, "labels": int(labels.sum()), "teacher_loss": loss})
    return documents
