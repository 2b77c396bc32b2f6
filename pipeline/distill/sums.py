"""Sums over entries and positions: their precision, 0 log 0, unused entries, and the counts of a mean."""

from __future__ import annotations

import torch
from torch import Tensor


def promote(tensor: Tensor) -> Tensor:
    """float32, or float64 for float64: the precision of every sum."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weighted(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference with 0 * anything = 0, the limit of p log p."""
    positive = p > 0
    return torch.where(positive, p * torch.where(positive, difference, 0.0), 0.0)


def fill_unused(token_ids_NK: Tensor) -> Tensor:
    """Token ids with every unused entry (-1) replaced by the first one, so that gathers and scatters stay in range."""
    return torch.where(token_ids_NK >= 0, token_ids_NK, token_ids_NK[..., :1].clamp(min=0))


def at_least_one(count: Tensor | int) -> Tensor | int:
    """A count as a divisor: the loss of a batch without such positions is 0, not NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def mean_over(values: Tensor, mask: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Sum of `values` [...] over `mask` [...], divided by `count`, by default the number of positions in the mask."""
    return torch.where(mask, values, 0.0).sum() / at_least_one(mask.sum() if count is None else count)
