"""The last lines of stage one: what the finished cache holds, and whether the teacher fits the text."""

from __future__ import annotations

import logging
import math

import numpy as np

from ..corpus.labels import IGNORE
from ..corpus.rows import PackedRows
from ..recipe.schema import Recipe
from ..store.reader import LogitCache

logger = logging.getLogger(__name__)


def log_summary(recipe: Recipe) -> None:
    """Log size and teacher loss of the finished cache; warn where a unigram model of the rows does as well as the
    teacher."""
    done = LogitCache(recipe.paths.cache)
    log_size(done)
    if not done.positions:
        return
    unigram = unigram_loss(PackedRows.of_cache(done.path), done.vocab_size)
    if done.teacher_loss >= unigram:
        logger.warning(
            f"warning: the teacher's loss ({done.teacher_loss:.3f} nats) is no better than the rows' own token "
            f"frequencies ({unigram:.3f}): is it the right model, tokenizer and text?"
        )


def log_size(done: LogitCache, note: str = "") -> None:
    """Log size and teacher loss of a cache, from its records alone."""
    size = "no position has a target"
    if done.positions:
        size = (
            f"{done.positions:,} positions, {done.bytes / done.positions:.1f} bytes each, teacher loss "
            f"{done.teacher_loss:.3f} nats"
        )
    logger.info(f"cache: {done.path}: {note}{size}")


def unigram_loss(corpus: PackedRows, vocab_size: int) -> float:
    """Cross-entropy in nats of a unigram model of the rows: a useful teacher's loss is lower.

    Each token is predicted from the frequencies of all other tokens, so that a short text does not predict itself. Only
    labels count, as in the teacher's loss: neither padding nor the start of a row is predicted.
    """
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, corpus.rows, 1024):
        rows = np.arange(first, min(first + 1024, corpus.rows))
        labels = corpus.labels(rows)
        counts += np.bincount(labels[labels != IGNORE], minlength=vocab_size)
    seen = counts[counts > 0]
    total, types = int(seen.sum()), len(seen)
    # Additive smoothing: as many pseudo-counts as there are token types, spread evenly over the vocabulary.
    p = (seen - 1 + types / vocab_size) / (total - 1 + types)
    return -math.fsum(seen * np.log(p)) / total
