"""Levels: the scale that rounds log-probabilities.

A log-probability x nats below its reference is stored as level log(1 + b x / a) / b, rounded: steps grow from a where
tokens are likely to a + b x where they are not. The reference is the first head entry, or 0 where there is no head.

An error e_v in log p_v costs about 1/2 sum p_v e_v^2 of KL: with a = 0.045 and b = 0.033, 4e-4 at T = 1 and less above.
"""

from __future__ import annotations

import numpy as np

from .arrays import Array

LEVEL_STEP = 0.045
"""a, in nats."""
LEVEL_GROWTH = 0.033
"""b."""
LAST_LEVEL = 255
"""10,000 nats below the reference."""
TOP_ENTRIES = 8
"""The first entries of a position, whose levels are stored apart from the others'."""
MASS_UNIT = 2.0**-40
"""Probabilities are summed as multiples of this, so a sum does not depend on its order."""


def level_of(nats: Array) -> Array:
    """The nearest level of values in nats below the reference, int64; 0 for negative values."""
    return np.minimum(_nearest(nats), LAST_LEVEL).astype(np.int64)


def round_to_levels(nats: Array) -> Array:
    """Values in nats below the reference, rounded to the nearest level, in nats; NaN stays NaN."""
    return _nats_of(_nearest(nats))


def _nearest(nats: Array) -> Array:
    nearest: Array = np.rint(np.log1p(LEVEL_GROWTH / LEVEL_STEP * np.maximum(nats, 0.0)) / LEVEL_GROWTH)
    return nearest


def _nats_of(level: Array) -> Array:
    nats: Array = np.expm1(LEVEL_GROWTH * level) * (LEVEL_STEP / LEVEL_GROWTH)
    return nats


BOUNDS = _nats_of(np.arange(LAST_LEVEL) + 0.5)
"""[255] the upper end of every level but the last, in nats below the reference."""
_NATS = _nats_of(np.arange(LAST_LEVEL + 1))
LOG_PROBS = (-_NATS).astype(np.float32)
"""[256] log p relative to the reference, by level."""
MASSES = np.rint(np.exp(-_NATS) / MASS_UNIT).astype(np.int64)
"""[256] p relative to the reference, in units of MASS_UNIT, by level."""
