"""Draws by inverting a cumulative sum, against their definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from logit_cache.targets.draws import draw_tail
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def normal(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(logits_NV: Tensor, counts: list[int]) -> Tensor:
    """The first tokens of each row in order, -1 behind them."""
    ids_NK = logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, : max(counts)]
    return torch.where(torch.arange(max(counts)) < torch.tensor(counts)[:, None], ids_NK, -1)


def test_draws_are_where_the_cumulative_sum_passes_the_points() -> None:
    """Heads of several sizes, with token 0 in one and among the draws of others; a vocabulary of several blocks."""
    logits = normal(0, 4, 600)
    logits[:, 0] = torch.tensor([20.0, 6.0, 1.0, -math.inf], dtype=torch.float64)
    logits[2, 100:400] = -math.inf
    head = head_of(logits, [3, 0, 7, 1])
    points = torch.rand(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points[:, 0], points[:, 1] = 0.0, 1 - 2.0**-53
    p = logits.softmax(-1)
    for row in range(4):
        p[row, head[row][head[row] >= 0]] = 0.0
    cdf = (p / p.sum(-1, keepdim=True)).cumsum(-1)
    found = draw_tail(logits, head, points)
    # The first token above the point; float64 roundings of the two sums leave none of these undecided.
    expected = torch.searchsorted(cdf, points.clamp(max=1 - 1e-12), right=True)
    last = torch.stack([row.nonzero().max() for row in p])
    assert torch.equal(found, torch.minimum(expected, last[:, None]))
    assert (p.gather(-1, found) > 0).all()
    assert (found[1] == 0).any() and not (found[0] == 0).any()


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_the_number_of_draws() -> None:
    """4,096 draws, all at once 2 KiB each: in pieces, and the same ones as a few at a time."""
    logits = normal(2, 16, 1000).float()
    points = torch.rand(16, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    head = head_of(logits, [2] * 16)
    with LargestTensor() as largest:
        found = draw_tail(logits, head, points)
    assert largest.bytes <= 64 * 2**20
    for some in (slice(0, 3), slice(3000, 3070)):
        assert torch.equal(found[:, some], draw_tail(logits, head, points[:, some]))


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_rows_without_a_tail_give_ids_of_the_vocabulary(wrong: float) -> None:
    logits = torch.full((2, 300), wrong)
    logits[1] = 0.0
    found = draw_tail(logits, torch.full((2, 0), -1), torch.rand(2, 9, dtype=torch.float64))
    assert (found >= 0).all() and (found < 300).all()
