"""Coordinates of tails as small integers.

    coordinates    z_i of every position, as a difference from its prediction, in whole steps

The head of a position tells most of what its coordinates are: the prediction is linear in the mean of the directions
of its head's tokens (`TailBasis.prediction`), and rounding follows it, so that the last bits of a prediction, which
differ between machines, cost nothing. On SmolLM2 (k = 16, r = 32, step 0.15) a position takes 4.0 bytes, and 6.9
without. The profile `fast` has no predictions. All coordinates have one step: `targets.basis_fit` makes an error of one
as costly as that of any other.

Shapes: B rows, L positions, N = B L, K kept entries, V vocabulary, R coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..base.kernels import compiled
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from .arrays import Array, Arrays, RowShape

NAME = "coordinates"
_LARGEST = 32767


@dataclass(frozen=True, eq=False)
class CoordinateCodec:
    """Encodes and decodes the coordinates of one cache."""

    rank: int
    """R"""
    step: float
    predicted: bool
    """Whether differences from predictions are stored, or the coordinates themselves."""
    basis: TailBasis | None = None
    """None until it is learned."""

    def to_json(self) -> dict[str, Any]:
        basis = None if self.basis is None else self.basis.digest
        return {"rank": self.rank, "step": self.step, "predicted": self.predicted, "basis": basis}

    @classmethod
    def from_json(cls, value: dict[str, Any], basis: TailBasis | None) -> CoordinateCodec:
        """Raises ValueError for numbers that no codec has, or a basis of another rank."""
        codec = cls(int(value["rank"]), float(value["step"]), bool(value["predicted"]), basis)
        if codec.rank < 1 or not 0 < codec.step < np.inf or (basis is not None and basis.rank != codec.rank):
            raise ValueError(f"coordinates of rank {value['rank']} and step {value['step']} do not fit their basis")
        return codec

    def layout(self) -> dict[str, str]:
        """Name -> dtype of the stored array."""
        return {NAME: "int16"}

    def shapes(self, row_length: int) -> dict[str, RowShape]:
        """Name -> shape of a row of it."""
        return {NAME: (row_length, self.rank)}

    def encode(self, targets: SparseTargets) -> Arrays:
        """Targets [B, L] with coordinates -> coordinates [B, L, R]. Raises ValueError for targets without."""
        flat = targets.flatten()
        if flat.tail_coordinates is None:
            raise ValueError("targets of a cache with tail shapes need coordinates")
        z_NR = flat.tail_coordinates.cpu().numpy()
        heads_N = torch.where(flat.mask, flat.head_mask.sum(-1), -1).cpu().numpy()
        predicted_NR = self._decode(np.zeros(z_NR.shape, np.int16), flat.token_ids.cpu().numpy(), heads_N)
        steps_NR = np.clip(np.rint((z_NR - predicted_NR) / self.step), -_LARGEST, _LARGEST)
        return {NAME: np.where(heads_N[:, None] >= 0, steps_NR, 0).reshape(*targets.mask.shape, self.rank)}

    def decode(self, steps_NR: Array, token_ids_NK: Array, heads_N: Array, mask_N: Array) -> Array:
        """Stored steps, with the head's ids and their number at each position -> z [N, R] float32, 0 without a target.

        The first `heads_N` ids of a position are its head.
        """
        return self._decode(steps_NR.reshape(-1, self.rank), token_ids_NK, np.where(mask_N, heads_N, -1))

    def _decode(self, steps_NR: Array, token_ids_NK: Array, heads_N: Array) -> Array:
        """`heads_N` is -1 at positions without a target."""
        z_NR = np.empty(steps_NR.shape, np.float32)
        directions_VR, weights_MR = self._prediction
        kernel_arguments = (
            steps_NR.astype(np.int16, copy=False),
            self.step,
            np.ascontiguousarray(token_ids_NK, np.int64),
        )
        _coordinates(*kernel_arguments, heads_N.astype(np.int64), directions_VR, weights_MR, z_NR)
        return z_NR

    @cached_property
    def _prediction(self) -> tuple[Array, Array]:
        """Directions of the tokens [V, R], and weights [R + 1, R] of a constant and of each entry of their mean."""
        if not self.predicted:
            return np.zeros((0, self.rank), np.float32), np.zeros((0, self.rank), np.float32)
        assert self.basis is not None and self.basis.prediction is not None
        directions_VR = np.ascontiguousarray(self.basis.directions.cpu().numpy())
        return directions_VR, np.ascontiguousarray(self.basis.prediction.cpu().numpy())


@compiled
def _coordinates(
    steps_NR: Array,
    step: float,
    token_ids_NK: Array,
    heads_N: Array,
    directions_VR: Array,
    weights_MR: Array,
    z_NR: Array,
) -> None:
    """Predictions plus steps [N, R], in one order of summation; 0 where `heads_N` is -1.

    Four rows of a table at a time: a pass over the running sums costs as much as one over a row.
    """
    rank, step32 = z_NR.shape[1], np.float32(step)
    mean_R = np.empty(rank, np.float32)
    for position in range(len(heads_N)):
        heads, z_R, steps_R, ids_K = heads_N[position], z_NR[position], steps_NR[position], token_ids_NK[position]
        if heads < 0:
            z_R[:] = 0
            continue
        for i in range(rank):
            z_R[i] = np.float32(steps_R[i]) * step32
        if len(weights_MR) == 0:
            continue
        mean_R[:] = 0
        fours = heads - heads % 4
        for entry in range(0, fours, 4):
            a_R, b_R = directions_VR[ids_K[entry]], directions_VR[ids_K[entry + 1]]
            c_R, d_R = directions_VR[ids_K[entry + 2]], directions_VR[ids_K[entry + 3]]
            for i in range(rank):
                mean_R[i] += (a_R[i] + b_R[i]) + (c_R[i] + d_R[i])
        for entry in range(fours, heads):
            a_R = directions_VR[ids_K[entry]]
            for i in range(rank):
                mean_R[i] += a_R[i]
        share = np.float32(1) / np.float32(max(heads, 1))
        constant_R = weights_MR[0]
        for i in range(rank):
            z_R[i] += constant_R[i]
            mean_R[i] *= share
        fours = rank - rank % 4
        for j in range(0, fours, 4):
            a_R, b_R, c_R, d_R = weights_MR[j + 1], weights_MR[j + 2], weights_MR[j + 3], weights_MR[j + 4]
            a, b, c, d = mean_R[j], mean_R[j + 1], mean_R[j + 2], mean_R[j + 3]
            for i in range(rank):
                z_R[i] += (a * a_R[i] + b * b_R[i]) + (c * c_R[i] + d * d_R[i])
        for j in range(fours, rank):
            a, a_R = mean_R[j], weights_MR[j + 1]
            for i in range(rank):
                z_R[i] += a * a_R[i]
