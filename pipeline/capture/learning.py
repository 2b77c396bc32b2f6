"""What stage one learns of a cache before its first shard, from rows spread over the whole corpus.

The first shards of a corpus may be in another language than the rest, so that what is learned of them would serve the
rest badly. The rows depend on the corpus alone, and they run in batches of a fixed size: whichever task comes first,
and wherever an earlier run was killed, the same is learned.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from ..base.progress import Meter
from ..corpus.labels import labels_of
from ..corpus.rows import Int64Array, PackedRows
from ..models.teacher import Teacher
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds
from .teacher_pass import TeacherPass, check_numbers

logger = logging.getLogger(__name__)

MOST_POSITIONS = 2**17
"""Positions learned from in a large corpus."""
LEAST_POSITIONS = 2**13
"""Positions learned from in a small corpus, if it has so many."""
SHARE = 32
"""Between the two, one position of so many is learned from."""
_BATCH_POSITIONS = 2**11
"""Positions per forward pass: few enough for the memory of any device that serves the teacher."""


def learning_rows(rows: int, row_length: int) -> Int64Array:
    """The rows that a cache learns from, ascending: one of each of equal parts of the corpus.

    A function of the corpus's size alone. Within its part a row is drawn, since every hundredth row of a corpus may be
    special.
    """
    positions = min(max(rows * row_length // SHARE, LEAST_POSITIONS), MOST_POSITIONS)
    edges = np.linspace(0, rows, min(-(-positions // row_length), rows) + 1).astype(np.int64)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def learned_codec(teacher: Teacher, corpus: PackedRows, manifest: Manifest, title: str) -> TargetCodec:
    """The codec of a new cache, fitted to its rows; `title` names the cache in the progress line.

    Raises RecipeError where the teacher's output is no distribution.
    """
    codec, length = manifest.codec, manifest.row_length
    rows = learning_rows(corpus.rows, length)
    if not codec.learns or not len(rows):
        return codec
    logger.info(f"{title}: learning from {len(rows)} of {corpus.rows} rows")
    run = TeacherPass(teacher, codec.support, codec.knots)
    columns = corpus.columns(rows)
    labels = labels_of(columns)
    mask = manifest.target_mask(labels, columns["segment_ids"])
    seeds = row_seeds(manifest.identity.get("seed", 0), rows, length)
    size = max(_BATCH_POSITIONS // length, 1)
    parts = []
    with Meter(f"{title}: learning", rows.size * length) as meter:
        for first in range(0, len(rows), size):
            some = slice(first, first + size)
            result = run(
                torch.from_numpy(columns["input_ids"][some]).long(),
                torch.from_numpy(columns["segment_ids"][some]).long(),
                torch.from_numpy(labels[some]),
                seeds=seeds[some],
                mask=torch.from_numpy(mask[some]),
            )
            check_numbers(result.targets, result.nats_B, "the rows learned from")
            parts.append(result.targets.to("cpu").trim())
            meter.advance(labels[some].size)
    return codec.learn(SparseTargets.cat(parts), columns["input_ids"], corpus.rows * length)
