"""Sparse targets: the part of a teacher's distribution that a cache keeps at each position.

A target is the *head* (token ids with log-probabilities), for some supports *samples* of all other tokens, and the
*tail curve*: with R the tokens outside the head and beta = 1/T,

    F(beta) = log sum_{v in R} exp(beta * l_v)            l = log-probabilities at T = 1

which gives the exact teacher probability of every head token, and of R as a whole, at any temperature:

    A(beta)    = log( sum_{v in H} exp(beta * l_v) + exp F(beta) )
    log p_T(v) = beta * l_v - A(beta)                     v in H
    log p_T(R) = F(beta) - A(beta)

F is smooth and convex and F(0) = log|R| is known, so a polynomial through a few stored points serves every T. Where a
cache has a *tail shape* (`basis`), a few coordinates say how that mass is spread over R, and the target is a
distribution p^_T over the whole vocabulary (`dense`): exact on the head, the tail's mass exact, its shape approximate.

`supports` chooses the tokens; `reduce` has the arithmetic of `from_logits`, which alone imports it, so that students do
not load its kernels. Shapes: [...] any leading axes, K kept entries, J knots, V vocabulary, r coordinates of the tail's
shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..recipe.choices import DEFAULT_KNOTS, SupportName
from .basis import TailBasis, same_basis
from .knots import curve_at, inverse_temperature
from .positions import Positions
from .whole import log_whole

if TYPE_CHECKING:
    from .supports import Support


@dataclass(frozen=True)
class SparseTargets(Positions):
    """Targets of any number of positions; every tensor has the same leading axes, written [...] below."""

    token_ids: Tensor
    """[..., K] int64: the head, then the samples, both in descending probability; -1 where unused."""
    log_probs: Tensor
    """[..., K] float32, log-probability at T = 1 in nats, -inf where unused.

    Where 1 is the only knot of a cache, a sample has the log of its share of the tail mass instead.
    """
    tail_curve: Tensor
    """[..., J] float32, F(beta) in nats at `knots`, -inf where the tail is empty."""
    mask: Tensor
    """[...] bool, True at positions with a target."""
    knots: tuple[float, ...]
    """J ascending inverse temperatures, 1.0 among them."""
    vocab_size: int
    draws: Tensor | None = None
    """[..., K] int64, the count of each sample; 0 on the head and where unused. None for supports without samples."""
    tail_coordinates: Tensor | None = None
    """[..., r] float32, z in the tail basis; None for a cache whose tail is a bucket."""
    label_log_probs: Tensor | None = None
    """[...] float32, log p at T = 1 of the label, nats; 0 where there is none.

    None where the cache does not keep it.
    """
    basis: TailBasis | None = None
    """What the coordinates refer to, shared by all positions; None without coordinates."""

    @property
    def head_mask(self) -> Tensor:
        """[..., K] bool, entries of the head."""
        used = self.token_ids >= 0
        return used if self.draws is None else used & (self.draws == 0)

    @property
    def weights(self) -> Tensor:
        """[..., K] float32, the weight of each entry in an estimate of p at T = 1; 0 where unused.

        Exact probabilities on the head; a sample has its share of the tail mass. Weights sum to 1 with samples, to the
        head's mass without.
        """
        weights = self.log_probs.exp()
        samples = self.tail_samples(1.0)
        return weights if samples is None else torch.where(self.head_mask, weights, samples[0])

    def at_temperature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher at temperature T.

        Returns (log_p [..., K], log_tail [...]), both float32 in nats: log p_T of every head token (-inf elsewhere) and
        log p_T(R) (-inf where the tail is empty). exp(log_p).sum(-1) + exp(log_tail) = 1.

        Raises ValueError for T <= 0, and for T < 1 beyond the largest stored knot: F is never extrapolated.
        """
        scaled, tail, normaliser = self._scaled(temperature)
        return scaled - normaliser.unsqueeze(-1), tail - normaliser

    def normaliser(self, temperature: float) -> Tensor:
        """A(beta) [...] in nats: log p_T(v) = beta log p(v) - A(beta) for every token v. Raises as `at_temperature`."""
        return self._scaled(temperature)[2]

    def tail_samples(self, temperature: float) -> tuple[Tensor, Tensor] | None:
        """The samples as an estimate of the tail at temperature T; None for a support without samples.

        Returns (w_T, log_p_T), both [..., K] float32: the share of the tail mass p_T(R) of each sample (0 off the
        samples, sum p_T(R)), and its own log p_T (-inf off the samples).

        A sample drawn c_v times in n has weight c_v / n of the tail at T = 1. At another T its importance weight is c_v
        p_T(v) / (n p(v) / p(R)), proportional to c_v p(v)^(beta - 1); the weights are scaled to sum to p_T(R), which
        the tail curve gives. Unscaled weights are unbiased, but at T > 1 a few rare tokens dominate their sum, whose
        error is then as large as p_T(R): over 1,024 positions of SmolLM2 and 50 draws, the gradient of the output layer
        is off by 7.3 times its own norm at T = 2 with unscaled weights, 4.5 times with scaled ones, at T = 4 by 361 and
        63 times. Samples serve T near 1, where the two weights agree and the error is 0.09; for T = 2 use topk with k =
        64 (0.34).

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

    def dense(self, temperature: float) -> Tensor:
        """p^_T [..., V] at temperature T, float32; all 0 where there is no target. For small cases and tests.

        p_T on the head, p_T(R) r_T(v) on the tail. Raises ValueError without a tail shape, and as `at_temperature`.
        """
        if self.basis is None or self.tail_coordinates is None:
            raise ValueError("these targets have no tail shape: cache with cache.tail_rank above 0")
        log_p, log_tail = self.at_temperature(temperature)
        shape = self.basis.logits(self.tail_coordinates.to(log_p.dtype)).div_(temperature)
        if (missing := self.vocab_size - self.basis.vocab_size) > 0:  # tokens of another teacher
            shape = pad(shape, (0, missing), value=-math.inf)
        head_ids = torch.where(self.head_mask, self.token_ids, -1)
        return log_whole(head_ids, log_p, log_tail, shape).exp_()

    def _scaled(self, temperature: float, *, head: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """beta * l [..., K] on head or samples (-inf elsewhere), F(beta) [...] and A(beta) [...]."""
        beta = inverse_temperature(temperature, self.knots)
        tail = curve_at(self.tail_curve, self.knots, beta, self.vocab_size - self.head_mask.sum(-1))
        scaled = self.log_probs * beta
        on_head = scaled if self.draws is None else torch.where(self.draws == 0, scaled, -math.inf)
        normaliser = torch.logaddexp(torch.logsumexp(on_head, -1), tail)
        # A position without a target is all -inf; -inf minus its normaliser would be NaN.
        normaliser = torch.where(torch.isneginf(normaliser), 0.0, normaliser)
        if head or self.draws is None:
            return on_head, tail, normaliser
        return torch.where(self.draws > 0, scaled, -math.inf), tail, normaliser

    def restrict_vocabulary(self, vocab_size: int) -> Self:
        """The same targets for a student whose output layer has only the first `vocab_size` token ids.

        Teachers and students pad their vocabularies to different sizes; ids beyond the student's are padding that no
        text contains. Their probability moves from head to tail, exactly, at every knot. Targets that fit are returned
        as they are.
        """
        if vocab_size >= self.vocab_size:
            return self
        gone = self.token_ids >= vocab_size
        # A sample is part of the tail already.
        left = torch.where(gone & self.head_mask, self.log_probs, -math.inf)
        moved = torch.stack([torch.logsumexp(knot * left, -1) for knot in self.knots], -1)
        tail_curve = torch.logaddexp(self.tail_curve, moved)
        # Unused entries go last.
        order = gone.to(torch.int8).argsort(dim=-1, stable=True)
        token_ids = self.token_ids.masked_fill(gone, -1).gather(-1, order)
        log_probs = self.log_probs.masked_fill(gone, -math.inf).gather(-1, order)
        draws = None if self.draws is None else self.draws.masked_fill(gone, 0).gather(-1, order)
        basis = None if self.basis is None else self.basis.first(vocab_size)
        return replace(
            self,
            token_ids=token_ids,
            log_probs=log_probs,
            draws=draws,
            tail_curve=tail_curve,
            vocab_size=vocab_size,
            basis=basis,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        moved = super().to(device, non_blocking)
        return moved if self.basis is None else replace(moved, basis=self.basis.to(device))

    @staticmethod
    def stack(targets: Sequence[SparseTargets]) -> SparseTargets:
        """Stack equal leading shapes along a new axis. Raises as `joined`."""
        return targets[0].joined(torch.stack, targets)

    @staticmethod
    def cat(targets: Sequence[SparseTargets]) -> SparseTargets:
        """Concatenate along the first axis. Raises as `joined`."""
        return targets[0].joined(torch.cat, targets)

    def joined(self, function: Any, targets: Sequence[SparseTargets]) -> Self:
        """Stack or concatenate; narrower targets are padded with unused entries.

        Raises ValueError where only some have samples, two have different tail bases, or only some are the mean of
        several teachers: the loss treats all alike.
        """
        if len({target.draws is None for target in targets}) > 1:
            raise ValueError("targets with samples and targets without cannot be joined")
        if not all(same_basis(self.basis, target.basis) for target in targets):
            raise ValueError("targets of different tail bases cannot be joined")
        if len({type(target) for target in targets}) > 1:
            raise ValueError("targets of one teacher and means of several cannot be joined")
        return replace(self, **_joined_tensors(function, targets))

    def trim(self) -> Self:
        """Drop the last columns that no position uses. Copies one number from the device."""
        used = (self.token_ids >= 0).flatten(0, -2).any(0)
        width = max(int((used * torch.arange(1, used.numel() + 1, device=used.device)).max()) if used.numel() else 0, 1)
        entries = ("token_ids", "log_probs", "draws")
        return replace(self, **{n: t[..., :width] for n in entries if (t := getattr(self, n)) is not None})

    @staticmethod
    def from_logits(
        logits: Tensor,
        *,
        support: SupportName | Support = "topk",
        k: int = 64,
        p: float | None = None,
        tau: float | None = None,
        draws: int | None = None,
        seed: int | Tensor = 0,
        knots: Sequence[float] = DEFAULT_KNOTS,
        mask: Tensor | None = None,
    ) -> SparseTargets:
        """Full logits [..., V] -> targets [...]: the one place where a distribution becomes a target (`reduce`).

        The support is given whole, or by its name and parameters. A logit of -inf is a token of probability 0. A position
        whose logits are no distribution (NaN, +inf, no finite one) has NaN.

        Raises ValueError for an unknown support, for parameters that are missing or out of range, and for k > V.
        """
        from .reduce import reduce_logits
        from .supports import Support

        rule = support if isinstance(support, Support) else Support.of(support, k=k, p=p, tau=tau, draws=draws)
        targets = SparseTargets(*reduce_logits(logits, rule, knots=knots, seed=seed, mask=mask))
        return targets.map(lambda tensor: tensor.reshape(logits.shape[:-1] + tensor.shape[1:]))


_UNUSED = {"token_ids": -1, "log_probs": -math.inf, "draws": 0}


def _joined_tensors(function: Any, targets: Sequence[SparseTargets]) -> dict[str, Any]:
    width = max(target.token_ids.shape[-1] for target in targets)
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(SparseTargets)):
        parts = [getattr(target, name) for target in targets]
        if not any(isinstance(part, Tensor) for part in parts):
            continue
        if any(part is None for part in parts):
            joined[name] = None  # label_log_probs, which only some may have
            continue
        if name in _UNUSED:
            gaps = [width - part.shape[-1] for part in parts]
            parts = [
                pad(part, (0, gap), value=_UNUSED[name]) if gap else part for part, gap in zip(parts, gaps, strict=True)
            ]
        joined[name] = function(parts)
    return joined
