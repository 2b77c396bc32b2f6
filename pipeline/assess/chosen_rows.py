"""Rows of a cache as a user names them."""

from __future__ import annotations

import re

import numpy as np

from ..base.errors import RecipeError
from ..store.reader import LogitCache

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def chosen_rows(cache: LogitCache, text: str) -> list[int]:
    """Rows by numbers and ranges ("0,5,9-12", both ends in), "spread:N", N spread evenly over the cache, or "worst:N",
    the N on which the teacher's loss is highest.

    Raises RecipeError for another text, and for rows that the cache does not have.
    """
    few = re.fullmatch(r"(spread|worst):([1-9]\d*)", text)
    if few is not None:
        count = min(int(few[2]), len(cache))
        if few[1] == "spread":
            return np.unique(np.linspace(0, len(cache) - 1, count).astype(int)).tolist() if count else []
        return [int(row) for row in np.argsort(-cache.teacher_losses(), kind="stable")[:count]]
    rows: list[int] = []
    for part in text.split(","):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise RecipeError(f"--rows {text!r}: write numbers and ranges (0,5,9-12), spread:N or worst:N")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < len(cache):
            raise RecipeError(
                f"--rows {text!r}: {part.strip()} is not inside 0..{len(cache) - 1}, the committed rows of {cache.path}"
            )
        rows += range(first, last + 1)
    return list(dict.fromkeys(rows))
