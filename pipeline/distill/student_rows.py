"""The rows that a student trains on: a cache or a view of caches."""

from __future__ import annotations

import numpy as np

from ..base.errors import recipe_error
from ..recipe.student import StudentConfig
from ..store.mixture import Ensemble, Mixture
from ..store.reader import LogitCache
from ..store.row_source import RowSource
from ..store.views import ShorterRows, Subset


def student_rows(config: StudentConfig, own: RowSource, seed: int) -> RowSource:
    """The run's own cache, or the view of it or of other caches that the student's settings name.

    Raises RecipeError for settings that do not fit the caches.
    """
    with recipe_error("students: caches, teachers or row_length cannot be used"):
        rows = own
        if config.caches is not None:
            sources = [LogitCache(path) for path in config.caches]
            length = min(source.row_length for source in sources)
            alike = [s if s.row_length == length else ShorterRows(s, length) for s in sources]
            rows = Mixture(alike, list(config.caches.values()), seed=seed)
        elif config.teachers is not None:
            rows = Ensemble([LogitCache(path) for path in config.teachers])
        if config.row_length is not None and config.row_length != rows.row_length:
            rows = ShorterRows(rows, config.row_length)
        if config.max_rows is not None and config.max_rows < len(rows):
            rows = Subset(rows, np.sort(np.random.default_rng(seed).permutation(len(rows))[: config.max_rows]))
    return rows
