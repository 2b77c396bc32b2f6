"""Targets over the whole vocabulary: what a loss asks of them, and head and tail's shape put together.

Shapes: [...] any leading axes, K entries, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class WholeTargets(Protocol):
    """Targets [...] that are distributions p^_T over the whole vocabulary: `SparseTargets` with a tail shape, or the
    mean of several teachers'.
    """

    @property
    def mask(self) -> Tensor:
        """[...] bool, positions that have a target."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def dense(self, temperature: float) -> Tensor:
        """p^_T [..., V], 0 where there is no target. Raises ValueError for a T that it does not serve."""
        ...

    def flatten(self) -> Self:
        """All leading axes as one."""
        ...

    def __getitem__(self, index: Any) -> Self:
        """Part of the positions, by an index of the leading axes."""
        ...


def log_whole(token_ids: Tensor, log_p: Tensor, log_tail: Tensor, shape_logits: Tensor) -> Tensor:
    """log p^_T [..., V] in nats, written over `shape_logits`.

    token_ids [..., K] with -1 in unused entries and their log_p [..., K] are the head, log_tail [...] is the tail's
    mass, which the softmax of shape_logits [..., V] spreads over all other tokens. All -inf where there is no target.
    """
    last_id, last_place = token_ids.max(-1, keepdim=True)
    # Unused entries repeat a used one; in an empty head all of them write what token 0 has.
    used, some = token_ids >= 0, last_id >= 0
    ids = torch.where(used, token_ids, last_id.clamp(min=0))
    shape_logits.scatter_(-1, ids, torch.where(some, -math.inf, shape_logits[..., :1]).expand(ids.shape))
    # From the largest, which is 0 then, so that large logits lose nothing; without a tail, -inf - -inf would be NaN.
    shape_logits -= shape_logits.amax(-1, keepdim=True).clamp(min=torch.finfo(shape_logits.dtype).min)
    together = torch.logsumexp(shape_logits, -1, keepdim=True)
    shape_logits += log_tail.unsqueeze(-1) - torch.where(torch.isneginf(together), 0.0, together)
    filled = torch.where(used, log_p, log_p.gather(-1, last_place))
    return shape_logits.scatter_(-1, ids, torch.where(some, filled, shape_logits[..., :1]))
