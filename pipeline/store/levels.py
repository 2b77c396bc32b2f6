"""levels."""

from __future__ import annotations

from functools import cache

import numpy as np

from .arrays import Array
from .entry_kernels import MASS_UNIT

LEVEL_STEP = 0.045
LEVEL_GROWTH = 0.033
HEAD_MASS_STEP = 1 / 64
TAIL_STEP = 1 / 128
_LAST_LEVEL = 255  # 10,000 nats below the first
_NO_TAIL = 32767
_LARGEST = 32766
_LEVELS = np.expm1(LEVEL_GROWTH * np.arange(_LAST_LEVEL + 1)) * (LEVEL_STEP / LEVEL_GROWTH)
_LOG_PROBS = (-_LEVELS).astype(np.float32)
_MASSES = np.rint(np.exp(-_LEVELS) / MASS_UNIT).astype(np.int64)


@cache
def _masses_of_steps() -> tuple[Array, Array]:
    """log p(head) and log p(tail) [65536] for a stored int16 of head_mass, seen as uint16."""
    stored = np.arange(2**16).astype(np.uint16).view(np.int16)
    log_odds = stored * HEAD_MASS_STEP
    log_tail = -np.logaddexp(0.0, log_odds)
    empty = stored == _NO_TAIL
    return np.where(empty, 0.0, log_odds + log_tail), np.where(empty, -np.inf, log_tail)
