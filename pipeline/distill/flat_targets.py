"""Targets as a loss reads them: at one temperature, positions flattened, and the label's probability in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..corpus.labels import IGNORE
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from ..targets.whole import WholeTargets, log_whole
from .divergences import position_scale, resolve_alpha
from .loss_settings import LossSettings

_LARGEST_SHARE = 31 / 32
"""Of the tail's mass that a label outside the head has.

Both are stored rounded: the label's could exceed the tail's.
"""


@dataclass(frozen=True)
class TailShape:
    """The logits of the tail's shape at N positions, as coordinates in a basis."""

    coordinates_NR: Tensor
    basis: TailBasis
    temperature: float

    def logits(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """beta t [N, vocab_size]; -inf for tokens that the basis does not have."""
        logits_NV = self.basis.logits(self.coordinates_NR.to(dtype)).div_(self.temperature)
        missing = vocab_size - self.basis.vocab_size
        return F.pad(logits_NV, (0, missing), value=-math.inf) if missing > 0 else logits_NV


@dataclass(frozen=True)
class FlatTargets:
    """Sparse targets of N positions at one temperature T."""

    tail_mode: str
    """The treatment of the tail: never `label` where the label's probability is known, since it is in the head then."""
    token_ids_NK: Tensor
    log_p_NK: Tensor
    """log p_T of the head, -inf elsewhere."""
    log_tail_N: Tensor
    """log p_T(R) of all other tokens together."""
    coverage_N: Tensor
    """The teacher's mass on the cached head at T."""
    samples: tuple[Tensor, Tensor] | None
    """Weights and log p_T [N, K] of the tail's samples (`SparseTargets.tail_samples`), in tail mode `bucket`."""
    shape: TailShape | None
    """In tail mode `shape`."""
    scale_N: Tensor | None
    """What the divergence takes from the whole sequence of a position (`divergences.position_scale`)."""

    @classmethod
    def of(cls, targets: SparseTargets, labels: Tensor, settings: LossSettings) -> FlatTargets:
        """From targets [...] whose last axis is the sequence, their labels [...] and settings that fit them."""
        mode = settings.tail_mode
        assert mode is not None
        temperature = settings.temperature
        log_p, log_tail = targets.at_temperature(temperature)
        coverage, token_ids = 1 - log_tail.exp(), targets.token_ids
        if mode == "shape" and targets.draws is not None:
            token_ids = torch.where(targets.head_mask, token_ids, -1)
        if mode in ("shape", "label") and targets.label_log_probs is not None:
            label_log_p = targets.label_log_probs / temperature - targets.normaliser(temperature)
            few = targets.vocab_size - targets.head_mask.sum(-1) < 2  # a tail of one token is exact already
            label_ids = torch.where(targets.mask & ~few, labels.reshape(log_tail.shape), IGNORE)
            token_ids, log_p, log_tail = _with_label(token_ids, log_p, log_tail, label_ids, label_log_p)
            mode = "bucket" if mode == "label" else mode
        alpha = resolve_alpha(settings.divergence, settings.alpha)
        scale = position_scale(settings.divergence, log_p, targets.mask, alpha)
        shape = None
        if mode == "shape":
            assert targets.tail_coordinates is not None and targets.basis is not None
            shape = TailShape(targets.tail_coordinates.flatten(0, -2), targets.basis, temperature)
        return cls(
            mode,
            token_ids.flatten(0, -2),
            log_p.flatten(0, -2),
            log_tail.flatten(),
            coverage.flatten(),
            targets.flatten().tail_samples(temperature) if mode == "bucket" else None,
            shape,
            None if scale is None else scale.flatten(),
        )

    def log_whole(self, vocab_size: int) -> Tensor:
        """log p^_T [N, vocab_size] of targets with a shape; -inf for tokens that only the student has."""
        assert self.shape is not None
        logits_NV = self.shape.logits(vocab_size, self.log_p_NK.dtype)
        return log_whole(self.token_ids_NK, self.log_p_NK, self.log_tail_N, logits_NV)

    def __getitem__(self, rows: slice) -> FlatTargets:
        shape = self.shape
        return FlatTargets(
            self.tail_mode,
            self.token_ids_NK[rows],
            self.log_p_NK[rows],
            self.log_tail_N[rows],
            self.coverage_N[rows],
            None if self.samples is None else (self.samples[0][rows], self.samples[1][rows]),
            None if shape is None else TailShape(shape.coordinates_NR[rows], shape.basis, shape.temperature),
            None if self.scale_N is None else self.scale_N[rows],
        )


def _with_label(
    token_ids: Tensor, log_p: Tensor, log_tail: Tensor, label_ids: Tensor, label_log_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A head with one more entry: the label, where it is in the tail, with its own log p_T. The tail loses its mass."""
    in_tail = (label_ids != IGNORE) & (token_ids != label_ids.unsqueeze(-1)).all(-1)
    limited = torch.minimum(label_log_p, log_tail + math.log(_LARGEST_SHARE))
    rest = log_tail + torch.log1p(-torch.where(in_tail, limited - log_tail, -math.inf).exp())
    token_ids = torch.cat([token_ids, torch.where(in_tail, label_ids, -1).unsqueeze(-1)], -1)
    log_p = torch.cat([log_p, torch.where(in_tail, limited, -math.inf).unsqueeze(-1)], -1)
    return token_ids, log_p, torch.where(in_tail, rest, log_tail)


@dataclass(frozen=True)
class DenseTargets:
    """Targets of N positions at one temperature that are known over the whole vocabulary only."""

    targets_N: WholeTargets
    temperature: float
    coverage_N: Tensor
    """1: every token's probability is told."""

    @classmethod
    def of(cls, targets: WholeTargets, settings: LossSettings) -> DenseTargets:
        """From targets [...] and settings that fit them."""
        flat_targets = targets.flatten()
        return cls(flat_targets, settings.temperature, torch.ones_like(flat_targets.mask, dtype=torch.float32))

    def log_whole(self, vocab_size: int) -> Tensor:
        """log p^_T [N, vocab_size]; -inf for tokens that only the student has."""
        log_p_NV = self.targets_N.dense(self.temperature).log()
        return F.pad(log_p_NV, (0, vocab_size - log_p_NV.shape[-1]), value=-math.inf)

    def __getitem__(self, rows: slice) -> DenseTargets:
        return DenseTargets(self.targets_N[rows], self.temperature, self.coverage_N[rows])


def flat(targets: SparseTargets | WholeTargets, labels: Tensor, settings: LossSettings) -> FlatTargets | DenseTargets:
    """Targets [...] with labels [...] as a loss reads them; `settings` fit them."""
    if isinstance(targets, SparseTargets):
        return FlatTargets.of(targets, labels, settings)
    return DenseTargets.of(targets, settings)
