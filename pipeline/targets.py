"""Sparse targets: the few numbers kept of a teacher's distribution at one position.

Shape suffixes: N positions, V vocabulary, K entries of the support, C points of the tail curve. A target is the *head*
(token ids with their log-probabilities), perhaps some *samples* of all other tokens, and the *tail curve*: with R the tokens
outside the head and beta = 1/T,

    F(beta) = log sum_{v in R} exp(beta * l_v)            l = log-probabilities at T = 1

which gives the exact teacher probability of every head token, and of all others together, at any temperature:

    A(beta)    = log( sum_{v in H} exp(beta * l_v) + exp F(beta) )
    log p_T(v) = beta * l_v - A(beta)                     v in H
    log p_T(R) = F(beta) - A(beta)

F is smooth and convex and F(0) = log|R| is known, so a polynomial through a few stored points serves every T.

Which tokens are kept is the business of `supports`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.reduction import head_and_rest, in_cache
from pipeline.supports import Support, position_seeds

# Chosen by the worst error of the tail mass at any T from 1 to 8, on SmolLM2's top 64 to 32: without 7/8 it is 0.006 to 0.011, at
# T = 1.1, with it 0.002.
DEFAULT_KNOTS = (0.25, 0.5, 0.75, 0.875)


@dataclass(frozen=True)
class SparseTargets:
    """Targets of any number of positions; every tensor has the same leading axes, written [...] below."""

    token_ids: Tensor
    """[..., K] int64, the head, then the samples, each most probable first; -1 where unused."""
    log_probs: Tensor
    """[..., K] float32, log-probability at T = 1 in nats, -inf where unused. A cache whose only knot is 1 keeps those of the
    head; a sample then has the log of the mass that it stands for."""
    tail_curve: Tensor
    """[..., C] float32, F(beta) in nats at `knots`, -inf where nothing is left out."""
    mask: Tensor
    """[...] bool, positions that have a target."""
    knots: tuple[float, ...]
    """C ascending inverse temperatures, 1.0 among them."""
    vocab_size: int
    draws: Tensor | None = None
    """[..., K] int64, how often a sample was drawn; 0 on the head and where unused. None for supports without samples."""

    @property
    def head_mask(self) -> Tensor:
        """[..., K] bool, entries of the head."""
        used = self.token_ids >= 0
        return used if self.draws is None else used & (self.draws == 0)

    @property
    def weights(self) -> Tensor:
        """[..., K] float32, the estimate of p(v) at T = 1 that each entry stands for; 0 where unused.

        Exact on the head; a sample stands for its share of the draws of the tail's mass. They sum to 1 where there are
        samples, else to the head's mass.
        """
        weights = self.log_probs.exp()
        samples = self.tail_samples(1.0)
        return weights if samples is None else torch.where(self.head_mask, weights, samples[0])

    def at_temperature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher at temperature T.

        Returns (log_p [..., K], log_tail [...]), both float32 in nats: log p_T of every head token (-inf elsewhere) and
        log p_T of all others together (-inf where there are none). exp(log_p).sum(-1) + exp(log_tail) = 1.

        Raises ValueError for T <= 0, and for T < 1 beyond the largest stored knot: F is never extrapolated.
        """
        scaled, tail, normaliser = self._scaled(temperature)
        return scaled - normaliser.unsqueeze(-1), tail - normaliser

    def tail_samples(self, temperature: float) -> tuple[Tensor, Tensor] | None:
        """What the samples say of the tail at temperature T; None for a support without samples.

        Returns (w_T, log_p_T), both [..., K] float32: the part of the tail's mass p_T(R) that each sample stands for (0
        off the samples, summing to p_T(R)), and its own log p_T (-inf off the samples).

        A sample drawn c_v times in n stands for c_v / n of the tail at T = 1. At another T its importance weight is
        c_v p_T(v) / (n p(v) / p(R)), proportional to c_v p(v)^(beta - 1); these are scaled to sum to p_T(R), which the tail
        curve knows. The plain weights are unbiased, but at T > 1 a few rare tokens make up their sum, which then misses p_T(R) by
        as much as itself: over 1,024 positions of SmolLM2 and 50 draws, the gradient of the output layer is off by 7.3 times its
        own norm at T = 2 with the plain weights, 4.5 times with the scaled ones, at T = 4 by 361 and 63 times. Both are for T
        near 1, where the two are one and the error is 0.09; for T = 2 keep the top 64 with their bucket (0.34).

        Raises ValueError as `at_temperature` does.
        """
        if self.draws is None:
            return None
        scaled, tail, normaliser = self._scaled(temperature, head=False)
        beta = inverse_temperature(temperature, self.knots)
        is_sample = self.draws > 0
        # log(c_v p_v^(beta - 1)), and its sum over the samples of a position.
        share = self.draws.to(scaled.dtype).log() + torch.where(is_sample, (beta - 1.0) * self.log_probs, -math.inf)
        together = torch.logsumexp(share, -1, keepdim=True)
        share = torch.where(is_sample, share - torch.where(torch.isneginf(together), 0.0, together), -math.inf)
        return (share + (tail - normaliser).unsqueeze(-1)).exp(), scaled - normaliser.unsqueeze(-1)

    def _scaled(self, temperature: float, *, head: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """beta * l [..., K] on head or samples (-inf elsewhere), F(beta) [...] and A(beta) [...]."""
        beta = inverse_temperature(temperature, self.knots)
        tail = self._tail_at(beta)
        scaled = self.log_probs * beta
        on_head = scaled if self.draws is None else torch.where(self.draws == 0, scaled, -math.inf)
        normaliser = torch.logaddexp(torch.logsumexp(on_head, -1), tail)
        # A position without a target is -inf throughout; its normaliser would turn that into NaN.
        normaliser = torch.where(torch.isneginf(normaliser), 0.0, normaliser)
        if head or self.draws is None:
            return on_head, tail, normaliser
        return torch.where(self.draws > 0, scaled, -math.inf), tail, normaliser

    def _tail_at(self, beta: float) -> Tensor:
        """F(beta) [...] by Lagrange interpolation through (0, log|R|) and the stored knots."""
        if beta in self.knots:
            return self.tail_curve[..., self.knots.index(beta)]
        nodes = (0.0, *self.knots)
        basis = [math.prod((beta - y) / (x - y) for y in nodes if y != x) for x in nodes]
        left_out = self.vocab_size - self.head_mask.sum(-1)
        # Where the tail is empty every F is -inf; the sum of +-inf terms is kept out of the way.
        empty = torch.isneginf(self.tail_curve[..., -1])
        curve = torch.where(empty.unsqueeze(-1), 0.0, self.tail_curve)
        value = basis[0] * left_out.clamp(min=1).to(curve.dtype).log()
        for weight, point in zip(basis[1:], curve.unbind(-1), strict=True):
            value = value + weight * point
        return torch.where(empty, -math.inf, value)

    def within(self, vocab_size: int) -> SparseTargets:
        """The same targets for a student whose output layer has only the first `vocab_size` token ids.

        Teachers and students pad their vocabularies to different sizes; ids beyond the student's are padding that no text
        has. What the teacher gives them is moved from head to tail, exactly, at every knot. Raises nothing; targets that
        fit already are returned as they are.
        """
        if vocab_size >= self.vocab_size:
            return self
        gone = self.token_ids >= vocab_size
        # A sample is of the tail already.
        left = torch.where(gone & self.head_mask, self.log_probs, -math.inf)
        moved = torch.stack([torch.logsumexp(knot * left, -1) for knot in self.knots], -1)
        tail_curve = torch.logaddexp(self.tail_curve, moved)
        # Unused entries stand last.
        order = gone.to(torch.int8).argsort(dim=-1, stable=True)
        token_ids = self.token_ids.masked_fill(gone, -1).gather(-1, order)
        log_probs = self.log_probs.masked_fill(gone, -math.inf).gather(-1, order)
        draws = None if self.draws is None else self.draws.masked_fill(gone, 0).gather(-1, order)
        return replace(
            self, token_ids=token_ids, log_probs=log_probs, draws=draws, tail_curve=tail_curve, vocab_size=vocab_size
        )

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
        """Stack equal leading shapes along a new axis."""
        return _join(torch.stack, targets)

    @staticmethod
    def cat(targets: Sequence[SparseTargets]) -> SparseTargets:
        """Concatenate along the first axis."""
        return _join(torch.cat, targets)

    def trim(self) -> SparseTargets:
        """Without the last entries that no position uses. Reads one number off the device."""
        used = (self.token_ids >= 0).flatten(0, -2).any(0)
        width = max(int((used * torch.arange(1, used.numel() + 1, device=used.device)).max()) if used.numel() else 0, 1)
        entries = ("token_ids", "log_probs", "draws")
        return replace(self, **{n: t[..., :width] for n in entries if (t := getattr(self, n)) is not None})

    def _map(self, function: Any) -> SparseTargets:
        parts = {name: getattr(self, name) for name in _TENSORS}
        return replace(self, **{name: function(part) for name, part in parts.items() if part is not None})

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        support: str = "topk",
        k: int = 64,
        p: float | None = None,
        tau: float | None = None,
        draws: int | None = None,
        seed: int | Tensor = 0,
        knots: Sequence[float] = DEFAULT_KNOTS,
        mask: Tensor | None = None,
    ) -> SparseTargets:
        """Reduce full logits [..., V] to targets [...]; the one place where a distribution becomes a target.

        `support` and its parameters are those of `supports`. Works in float32 whatever the dtype of `logits` (float64
        stays float64), and sums the tail by itself: taking it as one minus the head would lose it to rounding where the
        head holds nearly everything. `knots` are inverse temperatures of the tail curve; 1.0 is always added. `mask` [...]
        marks positions that have a target. Draws depend on `seed` alone: a number, with which positions are numbered in
        order, or one int64 per position [...] (`supports.position_seeds`).

        No gradient flows back into `logits`. Raises ValueError for an unknown support, for parameters that are missing or
        out of range, and for k > V.
        """
        vocab_size = logits.shape[-1]
        rule = Support.of(support, k=k, p=p, tau=tau, draws=draws)
        rule.check(vocab_size)
        shape, logits_NV = logits.shape[:-1], logits.detach().reshape(-1, vocab_size)
        knots = tuple(sorted({*(float(knot) for knot in knots), 1.0}))
        limit = min(rule.head_limit, vocab_size)
        top_NK, ids_NK, tail_max_N, sums_NC = head_and_rest(logits_NV, limit, knots)
        shift_N = torch.where(torch.isneginf(tail_max_N), 0.0, tail_max_N)
        # Relative to the largest logit, so that an offset common to all costs no precision.
        peak_N = top_NK[:, 0] if rule.has_head else tail_max_N
        top_NK = top_NK - peak_N.unsqueeze(-1)
        shift_N = shift_N - peak_N
        # Logarithms in float64: in float32 the last bit depends on where in a tensor a number stands, and so would a cache on
        # the rows of a batch.
        tail_N = (sums_NC[:, knots.index(1.0)] + shift_N).double()
        total_N = torch.logaddexp(torch.logsumexp(top_NK.double(), -1), tail_N).to(top_NK.dtype)
        log_p_NK = top_NK - total_N.unsqueeze(-1)
        shift_N = shift_N - total_N
        # A tensor of the knots would be a copy that a GPU waits for.
        curve_NC = sums_NC + torch.stack([knot * shift_N for knot in knots], -1)

        token_ids, log_probs, drawn = ids_NK, log_p_NK, None
        if rule.varies:
            in_head_NK = rule.head_mask(log_p_NK)
            left_NK = torch.where(in_head_NK, -math.inf, log_p_NK)
            back_NC = torch.stack([torch.logsumexp(knot * left_NK.double(), -1) for knot in knots], -1)
            curve_NC = torch.logaddexp(curve_NC.double(), back_NC).to(curve_NC.dtype)
            token_ids = torch.where(in_head_NK, ids_NK, -1)
            log_probs = torch.where(in_head_NK, log_p_NK, -math.inf)
            if rule.has_samples:
                if isinstance(seed, Tensor):
                    seeds_N = seed.reshape(-1).to(logits.device)
                else:
                    numbers = torch.arange(len(logits_NV), device=logits.device)
                    seeds_N = position_seeds(seed, torch.zeros_like(numbers), numbers)
                mass_N = curve_NC[:, knots.index(1.0)].exp()
                samples = []
                for some in in_cache(logits_NV):
                    tail_NV = logits_NV[some].to(mass_N.dtype, copy=True)
                    kept_NK = torch.where(in_head_NK[some], -math.inf, tail_NV.gather(-1, ids_NK[some]))
                    tail_NV.scatter_(-1, ids_NK[some], kept_NK)
                    samples.append(rule.draw(tail_NV, mass_N[some], seeds_N[some]))
                samples_Nn = torch.cat(samples)
                x_Nn = logits_NV.gather(-1, samples_Nn.clamp(min=0)).to(log_probs.dtype)
                log_samples_Nn = x_Nn - (peak_N + total_N).unsqueeze(-1)
                token_ids, log_probs, drawn = _with_samples(
                    token_ids, log_probs, samples_Nn, log_samples_Nn, rule.entry_limit
                )
        if mask is None:
            mask_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits.device)
        else:
            mask_N = mask.reshape(-1)
            token_ids = torch.where(mask_N.unsqueeze(-1), token_ids, -1)
            log_probs = torch.where(mask_N.unsqueeze(-1), log_probs, -math.inf)
            curve_NC = torch.where(mask_N.unsqueeze(-1), curve_NC, -math.inf)
            drawn = None if drawn is None else torch.where(mask_N.unsqueeze(-1), drawn, 0)
        flat = cls(token_ids, log_probs, curve_NC, mask_N, knots, vocab_size, drawn)
        return flat._map(lambda tensor: tensor.reshape(shape + tensor.shape[1:]))


_TENSORS = tuple(f.name for f in fields(SparseTargets) if f.name not in ("knots", "vocab_size"))
_UNUSED = {"token_ids": -1, "log_probs": -math.inf, "draws": 0}


def _join(function: Any, targets: Sequence[SparseTargets]) -> SparseTargets:
    """Stack or concatenate, with unused entries added where some keep fewer than others.

    Raises ValueError where only some have samples: without its own a target's tail is a bucket, which the others have not.
    """
    if len({t.draws is None for t in targets}) > 1:
        raise ValueError("targets with samples and targets without cannot be put together")
    width = max(t.token_ids.shape[-1] for t in targets)
    joined = {}
    for name in _TENSORS:
        parts = [getattr(t, name) for t in targets]
        if parts[0] is None:
            continue
        if name in _UNUSED:
            pad = torch.nn.functional.pad
            parts = [
                t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1]), value=_UNUSED[name]) for t in parts
            ]
        joined[name] = function(parts)
    return replace(targets[0], **joined)


def _with_samples(
    head_ids_NK: Tensor, head_log_p_NK: Tensor, samples_Nn: Tensor, log_p_Nn: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Head entries, a prefix of each row, followed by the samples: each token once, with how often it was drawn.

    Returns token_ids, log_probs and draws, all [N, width]; samples with the most probable first, equal ones by id.
    """
    count, n = samples_Nn.shape
    # Equal ids side by side, draws that were not made at the end.
    ids_Nn, order = torch.where(samples_Nn >= 0, samples_Nn, torch.iinfo(torch.int64).max).sort(-1)
    log_p_Nn = log_p_Nn.gather(-1, order)
    used_Nn = ids_Nn != torch.iinfo(torch.int64).max
    first_Nn = used_Nn.clone()
    first_Nn[:, 1:] &= ids_Nn[:, 1:] != ids_Nn[:, :-1]
    group_Nn = (first_Nn.cumsum(-1) - 1).clamp(min=0)
    drawn_Nn = torch.zeros_like(ids_Nn).scatter_add_(-1, group_Nn, used_Nn.long())
    drawn_Nn = torch.where(first_Nn, drawn_Nn.gather(-1, group_Nn), 0)
    # By probability, those that are no first of their kind last; stable, so that ids order the equal ones.
    _, order = torch.where(first_Nn, log_p_Nn, -math.inf).sort(dim=-1, descending=True, stable=True)
    ids_Nn, log_p_Nn, drawn_Nn = (t.gather(-1, order) for t in (ids_Nn, log_p_Nn, drawn_Nn))

    head_N1 = (head_ids_NK >= 0).sum(-1, keepdim=True)
    # One column more takes what has no place: unused entries of head and samples.
    places_Nn = torch.where(drawn_Nn > 0, head_N1 + torch.arange(n, device=ids_Nn.device), width)
    columns_K = torch.arange(head_ids_NK.shape[1], device=ids_Nn.device)
    places_NK = torch.where(head_ids_NK >= 0, columns_K, width)

    def placed(head: Tensor, samples: Tensor, fill: float) -> Tensor:
        out = torch.full((count, width + 1), fill, dtype=samples.dtype, device=samples.device)
        return out.scatter_(-1, places_NK, head).scatter_(-1, places_Nn, samples)[:, :width]

    token_ids = placed(head_ids_NK, ids_Nn, -1)
    log_probs = placed(head_log_p_NK, log_p_Nn, -math.inf)
    return token_ids, log_probs, placed(torch.zeros_like(head_ids_NK), drawn_Nn, 0)


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
    if len(knots) == 1 and abs(beta - knots[0]) > 1e-9:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, and these targets know it at "
            f"{knots[0]:g} only (imported top-k log-probabilities, or the mean of several teachers): use T = {1 / knots[0]:g}"
        )
    nearest = min(knots, key=lambda knot: abs(knot - beta))
    return nearest if abs(nearest - beta) < 1e-9 else beta
