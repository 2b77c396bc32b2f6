"""Targets and caches with a tail shape, of a teacher whose hidden states are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from logit_cache.store.batch import Batch
from logit_cache.store.row_source import RowSource, View
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets

KNOTS = (0.25, 0.5, 1.0, 2.0)
"""Each T of `TEMPERATURES` is exactly at a knot."""
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


@dataclass
class LinearTeacher:
    """Logits g(a + U h) of hidden states h [N, D], in float64."""

    offset: torch.Tensor
    directions: torch.Tensor
    softcap: float | None = None

    @classmethod
    def random(cls, vocab_size: int, width: int, seed: int = 0, softcap: float | None = None) -> LinearTeacher:
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        return cls(offset, torch.randn(vocab_size, width, generator=generator, dtype=torch.float64), softcap)

    def states(self, positions: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(positions, self.directions.shape[1], generator=generator, dtype=torch.float64)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.offset + states @ self.directions.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def probabilities(self, states: torch.Tensor, temperature: float) -> torch.Tensor:
        return torch.softmax(self.logits(states) / temperature, -1)

    def basis(self, rank: int | None = None, **facts: Any) -> TailBasis:
        """The first `rank` directions, by default all: the shape is then the teacher's own."""
        return TailBasis(self.offset, self.directions[:, :rank], self.softcap, **facts)

    def targets(self, states: torch.Tensor, basis: TailBasis | None = None, **support: Any) -> SparseTargets:
        """Targets with a shape in a basis of this teacher."""
        basis = self.basis() if basis is None else basis
        targets = SparseTargets.from_logits(self.logits(states), knots=KNOTS, **support)
        return replace(targets, tail_coordinates=states[..., : basis.rank], basis=basis)


class Shaped(View):
    """Rows of a source with coordinates drawn by `seed`, in a basis: for tests of what follows a cache."""

    def __init__(self, source: RowSource, basis: TailBasis, seed: int = 0) -> None:
        super().__init__(source)
        self._basis, self._seed = basis, seed

    def _settings(self) -> list[Any]:
        return [self._source.digest, self._seed]

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Sequence[int] | Any) -> Batch:
        batch = self._source.batch(indices)
        rows = [
            torch.randn(
                self.row_length, self._basis.rank, generator=torch.Generator().manual_seed(self._seed + int(row))
            )
            for row in self.checked(indices)
        ]
        label_log_probs = -batch["labels"].clamp(min=0).float() / 16
        targets = replace(
            batch["targets"], tail_coordinates=torch.stack(rows), basis=self._basis, label_log_probs=label_log_probs
        )
        return {**batch, "targets": targets}

    def segment_ids(self, indices: Any) -> Any:
        return self._source.segment_ids(indices)
