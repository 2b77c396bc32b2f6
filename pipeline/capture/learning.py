"""What stage one learns of a cache before its first shard, from rows spread over the whole corpus.

The codec learns how targets are stored in few bytes, and where tails have a shape, a basis is fitted to the teacher's
hidden states. The first shards of a corpus may be in another language than the rest, so that what is learned of them
would serve the rest badly. The rows depend on the corpus alone, and they run in batches of a fixed size: whichever task
comes first, and wherever an earlier run was killed, the same is learned.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..base.progress import Meter
from ..corpus.labels import labels_of
from ..corpus.rows import Int64Array, PackedRows
from ..models.teacher import Teacher
from ..store.arrays import Array
from ..store.basis_file import StoredBasis
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..store.manifest import Manifest
from ..targets.basis_fit import learn_basis
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support, row_seeds
from .teacher_pass import TeacherPass, check_numbers

logger = logging.getLogger(__name__)

MOST_POSITIONS = 2**17
"""Positions learned from in a large corpus."""
LEAST_POSITIONS = 2**13
"""Positions learned from in a small corpus, if it has so many."""
SHARE = 32
"""Between the two, one position of so many is learned from."""
_MOST_STATES = 2**16
"""Hidden states that a basis is fitted to: more make it no better and take gigabytes."""
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


def learn(
    teacher: Teacher, corpus: PackedRows, manifest: Manifest, title: str
) -> tuple[TargetCodec, StoredBasis | None]:
    """The codec of a new cache, fitted to its rows, and its tail basis, None where tails have no shape. `title` names
    the cache in the lines of progress.

    Raises RecipeError where the teacher's output is no distribution, and where there is nothing to fit a basis to.
    """
    codec, coordinates, positions = manifest.codec, manifest.codec.coordinates, corpus.rows * manifest.row_length
    rows = learning_rows(corpus.rows, manifest.row_length)
    hidden_ND = torch.empty(0)
    if len(rows) and (codec.learns or coordinates is not None):
        logger.info(f"{title}: learning from {len(rows)} of {corpus.rows} rows")
        targets, hidden_ND, contexts = _sample(teacher, corpus, manifest, rows, f"{title}: learning")
        codec = codec.learn(targets, contexts, positions)
    if coordinates is None:
        return codec, None
    if not len(hidden_ND):
        raise RecipeError(f"{title}: no position to learn a tail basis from has a target: set cache.tail_rank = 0")
    title = f"{title}: tail basis of rank {coordinates.rank}"
    logger.info(f"{title}: fitting to {len(hidden_ND):,} positions")
    basis = fitted_basis(hidden_ND, teacher, codec.support, coordinates, positions, title)
    return replace(codec, coordinates=replace(coordinates, basis=basis.basis())), basis


def fitted_basis(
    hidden_ND: Tensor, teacher: Teacher, support: Support, coordinates: CoordinateCodec, positions: int, title: str
) -> StoredBasis:
    """The tail basis of a cache of so many `positions`, rounded to small integers, fitted to hidden states of some.

    A step s costs s^2 / 24 nats of KL wherever it rounds: a coordinate, or a direction times a coordinate of standard
    deviation 1. Halving it costs a bit, for each coordinate of the cache or for each direction of every token. A bit
    saves as many nats in both places where the squares of the steps are as the counts of what they round.
    """
    layer = teacher.whole_output_layer()
    basis, projection = learn_basis(hidden_ND, layer, support, coordinates.rank, step=coordinates.step, title=title)
    spread_R = torch.cat([projection.coordinates(part) for part in torch.split(hidden_ND, 4096)]).std(0, correction=0)
    step = coordinates.step * min(math.sqrt(basis.vocab_size / max(positions, 1)), 0.5)
    # Where all positions have the same state, and so that 32,767 steps reach every direction.
    least_R = basis.directions.abs().amax(0) / 2**14
    steps_R = torch.maximum(step / spread_R.clamp(min=1e-6), least_R).clamp(min=1e-12)
    return StoredBasis.quantised(basis, projection, step, steps_R.tolist())


def _sample(
    teacher: Teacher, corpus: PackedRows, manifest: Manifest, rows: Int64Array, title: str
) -> tuple[SparseTargets, Tensor, Array]:
    """Targets of rows [B, L], hidden states [N, D] of positions with a target, and the tokens at all positions [B, L]."""
    codec, length = manifest.codec, manifest.row_length
    run = TeacherPass(teacher, codec.support, codec.knots)
    columns = corpus.columns(rows)
    labels = labels_of(columns)
    mask = manifest.target_mask(labels, columns["segment_ids"])
    seeds = row_seeds(manifest.identity.get("seed", 0), rows, length)
    size, every = max(_BATCH_POSITIONS // length, 1), max(-(-int(mask.sum()) // _MOST_STATES), 1)
    parts, states = [], []
    with Meter(title, rows.size * length) as meter:
        for first in range(0, len(rows), size):
            some = slice(first, first + size)
            result = run(
                torch.from_numpy(columns["input_ids"][some]).long(),
                torch.from_numpy(columns["segment_ids"][some]).long(),
                torch.from_numpy(labels[some]),
                seeds=seeds[some],
                mask=torch.from_numpy(mask[some]),
            )
            check_numbers(result.targets, result.nats_B, rows[some], title)
            parts.append(result.targets.to("cpu").trim())
            states.append(result.hidden_BLD[result.targets.mask][::every].cpu())
            meter.advance(labels[some].size)
    return SparseTargets.cat(parts), torch.cat(states), columns["input_ids"]
