"""The figures: what is drawn where nothing was asked for, and what cannot be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from logit_cache.assess.figures import draw_candidates
from logit_cache.base.errors import RecipeError
from logit_cache.store.batch import Batch
from logit_cache.store.reader import LogitCache

from tests.helpers.synthetic import make_cache


class WithoutTargets(LogitCache):
    """A cache whose middle rows have none, as those that a loss mask leaves nothing of."""

    middle = range(2, 5)

    def __getitem__(self, index: int) -> Batch:
        row = super().__getitem__(index)
        if index in self.middle:
            row["targets"] = replace(row["targets"], mask=torch.zeros_like(row["targets"].mask))
        return row


def test_a_row_with_a_target_is_drawn(tmp_path: Path) -> None:
    cache = WithoutTargets(make_cache(tmp_path / "cache", rows=6, shard_rows=4).path)
    assert draw_candidates(cache, None, None).axes
    with pytest.raises(RecipeError, match=r"report\.row = 3: no position of this held-out row has a target"):
        draw_candidates(cache, 3, None)
    cache.middle = range(6)
    with pytest.raises(RecipeError, match="has a target"):
        draw_candidates(cache, None, None)
