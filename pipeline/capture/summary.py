"""summary."""

from __future__ import annotations

import logging
import math

import numpy as np

from ..corpus.labels import IGNORE
from ..corpus.rows import PackedRows
from ..recipe.schema import Recipe
from ..store.reader import LogitCache

logger = logging.getLogger(__name__)


def summarise(recipe: Recipe) -> None:
    """What the finished cache is, and a warning where the teacher cannot be the right one."""
    done = LogitCache(recipe.paths.cache)
    if not done.positions:
        return
    logger.info(
        f"cache: {done.path}: {done.positions:,} positions, {done.bytes / done.positions:.1f} bytes each, "
        f"teacher loss {done.teacher_loss:.3f} nats"
    )
    unigram = unigram_loss(done.corpus, done.vocab_size)
    if done.teacher_loss >= unigram:
        logger.warning(
            f"warning: the teacher's loss ({done.teacher_loss:.3f} nats) is no better than the rows' own token "
            f"frequencies ({unigram:.3f}): is it the right model, tokenizer and text?"
        )


def unigram_loss(corpus: PackedRows, vocab_size: int) -> float:
    """Cross-entropy in nats of a unigram model of the rows: what a teacher must beat to have anything to teach.

    Every token is predicted from the frequencies of all others, so that a short text does not predict itself. Of masked rows
    the hidden tokens are counted, which are all that is predicted there.
    """
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, corpus.rows, 1024):
        rows = np.arange(first, min(first + 1024, corpus.rows))
        labels = corpus.labels(rows)
        tokens = labels[labels != IGNORE] if corpus.objective == "masked" else corpus.take(rows)[0].ravel()
        counts += np.bincount(tokens, minlength=vocab_size)
    seen = counts[counts > 0]
    total, kinds = int(seen.sum()), len(seen)
    # As many imagined tokens as there are kinds, spread evenly over the vocabulary, stand for what was not seen.
    p = (seen - 1 + kinds / vocab_size) / (total - 1 + kinds)
    return -math.fsum(seen * np.log(p)) / total
