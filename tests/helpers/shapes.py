"""Targets and caches with a tail shape, of a teacher whose hidden states are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from logit_cache.store.basis_file import StoredBasis, publish_basis, read_basis
from logit_cache.store.batch import Batch
from logit_cache.store.reader import LogitCache
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


def with_shape(batch: Batch, rows: Sequence[int], basis: TailBasis, seed: int) -> Batch:
    """A batch whose targets have coordinates and log-probabilities of the labels, drawn by `seed` and row; 0 where
    there is no target."""
    targets = batch["targets"]
    drawn = [torch.Generator().manual_seed(seed + row) for row in rows]
    length = targets.mask.shape[-1]
    coordinates = torch.stack([torch.randn(length, basis.rank, generator=generator) for generator in drawn])
    label_log_probs = -torch.stack([5 * torch.rand(length, generator=generator) for generator in drawn])
    shaped = replace(
        targets,
        tail_coordinates=torch.where(targets.mask.unsqueeze(-1), coordinates, 0.0),
        label_log_probs=torch.where(targets.mask, label_log_probs, 0.0),
        basis=basis,
    )
    return {**batch, "targets": shaped}


class Shaped(View):
    """Rows of a source with a tail shape that is drawn: for tests of what follows a cache."""

    def __init__(self, source: RowSource, basis: TailBasis, seed: int = 0) -> None:
        super().__init__(source)
        self._basis, self._seed = basis, seed

    def _settings(self) -> list[Any]:
        return [self._source.digest, self._seed]

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Sequence[int] | Any) -> Batch:
        return with_shape(self._source.batch(indices), self.checked(indices).tolist(), self._basis, self._seed)

    def segment_ids(self, indices: Any) -> Any:
        return self._source.segment_ids(indices)


class ShapedCache(LogitCache):
    """A cache with a tail shape that is drawn; its basis is in its folder."""

    def __init__(self, path: Path, stored: StoredBasis) -> None:
        super().__init__(path)
        publish_basis(path, stored)
        self.basis = read_basis(str(path), stored.digest)

    def batch(self, indices: Sequence[int] | Any) -> Batch:
        return with_shape(super().batch(indices), self.checked(indices).tolist(), self.basis, 0)
