"""Sparse targets as a loss reads them: at one temperature, positions flattened."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..targets.sparse_targets import SparseTargets
from .divergences import position_scale, resolve_alpha
from .loss_settings import LossSettings


@dataclass(frozen=True)
class FlatTargets:
    """Targets of N positions at one temperature T."""

    token_ids_NK: Tensor
    log_p_NK: Tensor
    """log p_T of the head, -inf elsewhere."""
    log_tail_N: Tensor
    """log p_T(R) of all other tokens together."""
    samples: tuple[Tensor, Tensor] | None
    """Weights and log p_T [N, K] of the tail's samples (`SparseTargets.tail_samples`)."""
    scale_N: Tensor | None
    """What the divergence takes from the whole sequence of a position (`divergences.position_scale`)."""

    @classmethod
    def of(cls, targets: SparseTargets, settings: LossSettings) -> FlatTargets:
        """From targets [...] whose last axis is the sequence."""
        log_p, log_tail = targets.at_temperature(settings.temperature)
        alpha = resolve_alpha(settings.divergence, settings.alpha)
        scale = position_scale(settings.divergence, log_p, targets.mask, alpha)
        flat = targets.flatten()
        return cls(
            flat.token_ids,
            log_p.reshape(flat.token_ids.shape),
            log_tail.reshape(-1),
            flat.tail_samples(settings.temperature),
            None if scale is None else scale.reshape(-1),
        )

    def __getitem__(self, rows: slice) -> FlatTargets:
        return FlatTargets(
            self.token_ids_NK[rows],
            self.log_p_NK[rows],
            self.log_tail_N[rows],
            None if self.samples is None else (self.samples[0][rows], self.samples[1][rows]),
            None if self.scale_N is None else self.scale_N[rows],
        )
