"""The rows that a student trains on: a cache or a view of caches."""

from __future__ import annotations

import logging

import numpy as np

from ..base.errors import MismatchError, RecipeError, recipe_error
from ..recipe.student import StudentConfig
from ..store.mixture import Ensemble, Mixture
from ..store.reader import LogitCache
from ..store.row_source import RowSource
from ..store.views import ShorterRows, Subset

logger = logging.getLogger(__name__)


def student_rows(config: StudentConfig, name: str, own: RowSource | None, seed: int) -> RowSource:
    """The run's own cache, or the view of it or of other caches that the settings of student `name` name.

    `own` may be None where they name others. Raises RecipeError for settings that do not fit the caches.
    """
    limit = config.max_teacher_loss
    with recipe_error("students: caches, teachers or row_length cannot be used"):
        rows: RowSource
        if config.caches is not None:
            sources = [plausible_rows(LogitCache(path), limit, name) for path in config.caches]
            length = min(source.row_length for source in sources)
            alike = [s if s.row_length == length else ShorterRows(s, length) for s in sources]
            rows = Mixture(alike, list(config.caches.values()), seed=seed)
        elif config.teachers is not None:
            rows = plausible_rows(Ensemble([LogitCache(path) for path in config.teachers]), limit, name)
        else:
            assert own is not None
            rows = plausible_rows(own, limit, name)
        if config.row_length is not None and config.row_length != rows.row_length:
            rows = ShorterRows(rows, config.row_length)
        if config.max_rows is not None and config.max_rows < len(rows):
            rows = Subset(rows, np.sort(np.random.default_rng(seed).permutation(len(rows))[: config.max_rows]))
    return rows


def evaluation_rows(config: StudentConfig, name: str, rows: RowSource, heldout: RowSource | None) -> RowSource | None:
    """The held-out rows on which student `name` is evaluated while it learns from `rows`; None where it is not.

    Raises RecipeError where there are none, MismatchError for those of another tokenizer.
    """
    if config.eval_steps is None:
        return None
    if heldout is None or not len(heldout):
        raise RecipeError(
            f"students.{name}.eval_steps: there are no held-out rows: set corpus.heldout_fraction above 0"
        )
    if heldout.tokenizer_digest != rows.tokenizer_digest or heldout.objective != rows.objective:
        raise MismatchError(
            f"students.{name}.eval_steps: the held-out rows have another tokenizer or objective than the student's caches: "
            "leave eval_steps out"
        )
    return heldout if heldout.row_length <= rows.row_length else ShorterRows(heldout, rows.row_length)


def plausible_rows(rows: RowSource, limit: float | None, name: str) -> RowSource:
    """The rows on which the teacher's own mean loss is `limit` or less, in nats per label; None: all of them.

    `name` is the student's in messages. Raises RecipeError where no row is left, or the loss is not kept.
    """
    if limit is None:
        return rows
    losses = rows.teacher_losses()
    kept = np.flatnonzero(losses <= np.float32(limit))
    if not len(kept):
        raise RecipeError(
            f"students.{name}.max_teacher_loss = {limit:g} leaves no row: the teacher's loss is {losses.min(initial=0):.3g} "
            "nats or more"
        )
    left_out = len(rows) - len(kept)
    logger.info(
        f"train {name}: {left_out:,} of {len(rows):,} rows left out, where the teacher's loss is above {limit:g} nats"
    )
    return Subset(rows, kept) if left_out else rows
