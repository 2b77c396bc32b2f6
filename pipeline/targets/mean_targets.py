"""The mean of several teachers' targets.

At T = 1 the mean of the probabilities over the union of the heads is a sparse target again, with the tail as a bucket:

    p(v) = sum_s w_s p_s(v)   for v in the union of the heads,     p(R) = sum_s w_s p_s(R)

A teacher without v in its head has it in its tail, and its share of p(v) stays in the bucket: p(v) is too low by at
most w_s times the smallest probability in that teacher's head.

The mean of softened distributions is not the softened mean, so one tail curve cannot serve other temperatures. Where
every teacher's target has a tail shape, the mean over the whole vocabulary is known at each T by its definition:

    p^_T(v) = sum_s w_s p^_T,s(v)                                             `MeanTargets.dense`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .positions import Positions
from .sparse_targets import SparseTargets


@dataclass(frozen=True)
class MeanTargets(Positions):
    """The weighted mean of several teachers' targets of the same positions."""

    members: tuple[SparseTargets, ...]
    weights: tuple[float, ...]
    """The shares of the members; their sum is 1."""

    @classmethod
    def of(cls, targets: Sequence[SparseTargets | MeanTargets], weights: Sequence[float]) -> MeanTargets:
        """The mean of targets that may be means themselves; the weights sum to 1."""
        shares: list[tuple[SparseTargets, float]] = []
        for part, weight in zip(targets, weights, strict=True):
            of_part = [(part, 1.0)] if isinstance(part, SparseTargets) else zip(part.members, part.weights, strict=True)
            shares += [(member, weight * share) for member, share in of_part]
        return cls(tuple(member for member, _ in shares), tuple(share for _, share in shares))

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        return self.members[0].mask

    @property
    def vocab_size(self) -> int:
        """The largest of the members'."""
        return max(member.vocab_size for member in self.members)

    def dense(self, temperature: float) -> Tensor:
        """p^_T [..., V] at temperature T, float32; all 0 where there is no target.

        Raises ValueError where a member has no tail shape or does not serve T.
        """
        vocab_size, total = self.vocab_size, torch.zeros(())
        for number, (member, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            part = member.dense(temperature).mul_(weight)
            if part.shape[-1] < vocab_size:
                part = pad(part, (0, vocab_size - part.shape[-1]))
            total = total.add_(part) if number else part
        return total

    def as_bucket(self) -> SparseTargets:
        """The mean at T = 1, with the tail as a bucket. M: entries of all members at a position."""
        heads = [head_only(member).flatten() for member in self.members]
        ids_NM = torch.cat([head.token_ids for head in heads], -1)
        log_p, log_tail = zip(*(head.at_temperature(1.0) for head in heads), strict=True)
        p_NM = torch.cat([part.double().exp() * weight for part, weight in zip(log_p, self.weights, strict=True)], -1)
        ids_NK, p_NK = _merged(ids_NM, p_NM)
        label_p = [head.label_log_probs.double().exp() for head in heads if head.label_log_probs is not None]
        mean = SparseTargets(
            token_ids=ids_NK,
            log_probs=p_NK.log().float(),
            # The mean of the tails: one minus the head would lose it to rounding.
            tail_curve=self._mean([part.double().exp() for part in log_tail]).log().float().unsqueeze(-1),
            mask=heads[0].mask,
            knots=(1.0,),
            vocab_size=self.vocab_size,
            label_log_probs=self._mean(label_p).log().float() if len(label_p) == len(heads) else None,
        )
        return mean.unflatten(tuple(self.mask.shape))

    def restrict_vocabulary(self, vocab_size: int) -> MeanTargets:
        """As `SparseTargets.restrict_vocabulary`."""
        return replace(self, members=tuple(member.restrict_vocabulary(vocab_size) for member in self.members))

    def map(self, function: Callable[[Tensor], Tensor]) -> MeanTargets:
        return replace(self, members=tuple(member.map(function) for member in self.members))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MeanTargets:
        return replace(self, members=tuple(member.to(device, non_blocking) for member in self.members))

    @staticmethod
    def stack(targets: Sequence[MeanTargets]) -> MeanTargets:
        """Stack equal leading shapes along a new axis. Raises as `SparseTargets.joined`."""
        of_each = zip(*(target.members for target in targets), strict=True)
        return replace(targets[0], members=tuple(SparseTargets.stack(parts) for parts in of_each))

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(parts[0])
        for part, weight in zip(parts, self.weights, strict=True):
            total += part * weight
        return total


def _merged(ids_NM: Tensor, p_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of several heads -> ids and probabilities [N, K] of their union, most probable first; -1 and 0 where
    unused."""
    ids_NM, order = ids_NM.sort(-1)
    p_NM = p_NM.gather(-1, order)
    # Equal ids are neighbours: sum each run into its first entry.
    first_NM = torch.ones_like(ids_NM, dtype=torch.bool)
    first_NM[:, 1:] = ids_NM[:, 1:] != ids_NM[:, :-1]
    run_NM = first_NM.cumsum(-1) - 1
    p_NM = torch.zeros_like(p_NM).scatter_add_(-1, run_NM, p_NM)
    ids_NM = torch.full_like(ids_NM, -1).scatter_(-1, run_NM, ids_NM)
    p_NM = torch.where(ids_NM >= 0, p_NM, 0.0)
    p_NM, order = p_NM.sort(dim=-1, descending=True, stable=True)
    ids_NM = torch.where(p_NM > 0, ids_NM.gather(-1, order), -1)
    width = max(int((ids_NM >= 0).sum(-1).max()), 1)
    return ids_NM[:, :width], p_NM[:, :width]


def head_only(targets: SparseTargets) -> SparseTargets:
    """The same targets without samples of the tail; its mass and its shape are known without them."""
    if targets.draws is None:
        return targets
    unused = ~targets.head_mask
    head = replace(
        targets,
        token_ids=targets.token_ids.masked_fill(unused, -1),
        log_probs=targets.log_probs.masked_fill(unused, -math.inf),
        draws=None,
    )
    return head.trim()
