"""Means over seeds with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Interval = tuple[float, float | None]
"""Mean and half-width of the 95 % interval, None where it is not known."""
_STUDENT_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t by number of values, one more than the degrees of freedom."""


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width of its 95 % interval (Student's t); None with one value, or of a student that diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), None
    quantile = _STUDENT_T_95.get(len(values), 1.96)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
