"""Sparse targets: the few numbers kept of a teacher's distribution at one position.

Shape suffixes: N positions, V vocabulary, K entries of the support, C points of the tail curve. A target is the *head*
(the kept token ids with their log-probabilities) and the *tail curve*: with R the tokens left out and beta = 1/T,

    F(beta) = log sum_{v in R} exp(beta * l_v)            l = log-probabilities at T = 1

which gives the exact teacher probability of every kept token, and of all others together, at any temperature:

    A(beta)    = log( sum_{v in H} exp(beta * l_v) + exp F(beta) )
    log p_T(v) = beta * l_v - A(beta)                     v in H
    log p_T(R) = F(beta) - A(beta)

F is smooth and convex and F(0) = log|R| is known, so a polynomial through a few stored points serves every T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

DEFAULT_KNOTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class SparseTargets:
    """Targets of any number of positions; every tensor has the same leading axes, written [...] below."""

    token_ids: Tensor
    """[..., K] int64, most probable first, -1 where unused."""
    log_probs: Tensor
    """[..., K] float32, log-probability at T = 1 in nats, -inf where unused."""
    tail_curve: Tensor
    """[..., C] float32, F(beta) in nats at `knots`, -inf where nothing is left out."""
    mask: Tensor
    """[...] bool, positions that have a target."""
    knots: tuple[float, ...]
    """C ascending inverse temperatures, 1.0 among them."""
    vocab_size: int

    @property
    def weights(self) -> Tensor:
        """[..., K] float32, the estimate of p(v) at T = 1 that each entry stands for; 0 where unused."""
        return self.log_probs.exp()

    def at_temperature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher at temperature T.

        Returns (log_p [..., K], log_tail [...]), both float32 in nats: log p_T of every kept token (-inf where unused)
        and log p_T of all others together (-inf where there are none). exp(log_p).sum(-1) + exp(log_tail) = 1.

        Raises ValueError for T <= 0, and for T < 1 beyond the largest stored knot: F is never extrapolated.
        """
        beta = inverse_temperature(temperature, self.knots)
        tail = self._tail_at(beta)
        scaled = self.log_probs * beta
        normaliser = torch.logaddexp(torch.logsumexp(scaled, -1), tail)
        # A position without a target is -inf throughout; its normaliser would turn that into NaN.
        normaliser = torch.where(torch.isneginf(normaliser), 0.0, normaliser)
        return scaled - normaliser.unsqueeze(-1), tail - normaliser

    def _tail_at(self, beta: float) -> Tensor:
        """F(beta) [...] by Lagrange interpolation through (0, log|R|) and the stored knots."""
        if beta in self.knots:
            return self.tail_curve[..., self.knots.index(beta)]
        nodes = (0.0, *self.knots)
        basis = [math.prod((beta - y) / (x - y) for y in nodes if y != x) for x in nodes]
        left_out = self.vocab_size - (self.token_ids >= 0).sum(-1)
        # Where the tail is empty every F is -inf; the sum of +-inf terms is kept out of the way.
        empty = torch.isneginf(self.tail_curve[..., -1])
        curve = torch.where(empty.unsqueeze(-1), 0.0, self.tail_curve)
        value = basis[0] * left_out.clamp(min=1).to(curve.dtype).log()
        for weight, point in zip(basis[1:], curve.unbind(-1), strict=True):
            value = value + weight * point
        return torch.where(empty, -math.inf, value)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Any) -> SparseTargets:
        """Index the leading axes, as a tensor would be."""
        return self._map(lambda tensor: tensor[index])

    def flatten(self) -> SparseTargets:
        """All leading axes merged into one."""
        lead = self.mask.dim()
        return self._map(lambda tensor: tensor.flatten(0, lead - 1) if lead > 1 else tensor)

    def unflatten(self, shape: tuple[int, ...]) -> SparseTargets:
        """The first axis split into several."""
        return self._map(lambda tensor: tensor.unflatten(0, shape))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTargets:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """Page-locked copies; DataLoader calls this when asked to pin."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def stack(targets: Sequence[SparseTargets]) -> SparseTargets:
        """Stack equal shapes along a new leading axis."""
        tensors: dict[str, Any] = {name: torch.stack([getattr(t, name) for t in targets]) for name in _TENSORS}
        return replace(targets[0], **tensors)

    @staticmethod
    def cat(targets: Sequence[SparseTargets]) -> SparseTargets:
        """Concatenate along the first axis."""
        tensors: dict[str, Any] = {name: torch.cat([getattr(t, name) for t in targets]) for name in _TENSORS}
        return replace(targets[0], **tensors)

    def _map(self, function: Any) -> SparseTargets:
        return replace(self, **{name: function(getattr(self, name)) for name in _TENSORS})

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        support: str = "topk",
        k: int = 64,
        knots: Sequence[float] = DEFAULT_KNOTS,
        mask: Tensor | None = None,
    ) -> SparseTargets:
        """Reduce full logits [..., V] to targets [...]; the one place where a distribution becomes a target.

        Works in float32 whatever the dtype of `logits` (float64 stays float64), and sums the tail by itself: taking it
        as one minus the head would lose it to rounding where the head holds nearly everything. `knots` are inverse
        temperatures of the tail curve; 1.0 is always added. `mask` [...] marks positions that have a target.

        Raises ValueError for an unknown support, or k outside 1..V.
        """
        vocab_size = logits.shape[-1]
        if support != "topk":
            raise ValueError(f"unknown support {support!r}: only 'topk' exists")
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k = {k} is outside 1..{vocab_size}, the size of the vocabulary")
        knots = tuple(sorted({*(float(knot) for knot in knots), 1.0}))
        top, token_ids = _topk(logits, k)
        # A private copy, as it is overwritten; .to() alone may hand back the caller's tensor.
        tail = logits.to(_accumulator(logits.dtype), copy=True)
        top = top.to(tail.dtype)
        tail.scatter_(-1, token_ids, -math.inf)
        tail_sums, tail_max = _power_sums(tail, knots)
        # Relative to the largest logit, so that an offset common to all costs no precision.
        peak = top[..., :1]
        top = top - peak
        tail_max = tail_max - peak.squeeze(-1)
        total = torch.logaddexp(torch.logsumexp(top, -1), tail_sums[knots.index(1.0)] + tail_max)
        log_probs = top - total.unsqueeze(-1)
        shift = tail_max - total
        tail_curve = torch.stack([log_sum + knot * shift for log_sum, knot in zip(tail_sums, knots, strict=True)], -1)
        if mask is None:
            mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        else:
            token_ids = torch.where(mask.unsqueeze(-1), token_ids, -1)
            log_probs = torch.where(mask.unsqueeze(-1), log_probs, -math.inf)
            tail_curve = torch.where(mask.unsqueeze(-1), tail_curve, -math.inf)
        return cls(token_ids, log_probs, tail_curve, mask, knots, vocab_size)


_TENSORS = tuple(f.name for f in fields(SparseTargets) if f.name not in ("knots", "vocab_size"))


def inverse_temperature(temperature: float, knots: Sequence[float]) -> float:
    """1/T, or ValueError where T is not positive or the tail curve does not reach it."""
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature {temperature} must be a positive number")
    beta = 1.0 / temperature
    if beta > max(knots) + 1e-12:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, but the cache keeps it only "
            f"up to {max(knots):g}: add {beta:g} to cache.knots and cache again, or use T >= {1 / max(knots):g}"
        )
    nearest = min(knots, key=lambda knot: abs(knot - beta))
    return nearest if abs(nearest - beta) < 1e-9 else beta


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest in descending order; equal ones (frequent in bf16) by ascending id, whatever topk made of them."""
    top, token_ids = torch.topk(logits, k, dim=-1)
    token_ids, order = token_ids.sort(-1)
    top, order = top.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return top, token_ids.gather(-1, order)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _power_sums(tail_NV: Tensor, knots: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """log sum_v exp(beta * (x_v - max x)) [...] for every knot, and the maximum [...]; overwrites its input.

    One exponential serves all knots that are multiples of the smallest: exp(n b x) = exp(b x)^n.
    """
    tail_max = tail_NV.amax(-1)
    shift = torch.where(torch.isneginf(tail_max), 0.0, tail_max)
    tail_NV -= shift.unsqueeze(-1)
    base = min(knots)
    multiples = [round(knot / base) for knot in knots]
    sums = []
    if max(multiples) <= 8 and all(abs(m * base - knot) < 1e-12 for m, knot in zip(multiples, knots, strict=True)):
        root = tail_NV.mul_(base).exp_()
        power, exponent = root, 1
        for multiple in multiples:
            for _ in range(multiple - exponent):
                # The first product must not write over the root itself.
                power = power * root if power is root else power.mul_(root)
            exponent = multiple
            sums.append(power.sum(-1).log())
    else:
        sums = [(tail_NV * knot).exp_().sum(-1).log() for knot in knots]
    return sums, shift
