"""Tail bases as they are stored: small integers with a step for the offsets and one for each direction.

    offset_v = offset_step * offset[v]              u_vi = direction_steps[i] * directions[i, v]

with the projection that stage one computes coordinates by. What students train with is what is stored: `TailBasis` in
memory is the decoded form, so that teacher, student and `verify` see the same numbers. Shapes: V vocabulary, r
coordinates, D hidden size; every stored array has a leading axis of chunks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from ..base.errors import CorruptError
from ..base.places import Place, place
from ..recipe.paths import CachePaths
from ..targets.basis import TailBasis, TailProjection
from .arrays import Array, Arrays
from .learned import publish_learned, read_learned

_DTYPES = {
    "offset": "<i4",
    "offset_step": "<f4",
    "directions": "<i2",
    "direction_steps": "<f4",
    "softcap": "<f4",
    "center": "<f4",
    "projection": "<f4",
    "prediction": "<f4",
}
_known: WeakValueDictionary[tuple[str, str], TailBasis] = WeakValueDictionary()
"""Bases in use by cache and digest: all targets of a process share one, which a device copies once."""


@dataclass(frozen=True, eq=False)
class StoredBasis:
    """A tail basis and its projection, quantised."""

    offset: Array
    """[1, V] int32."""
    offset_step: Array
    """[1, 1] float32, nats."""
    directions: Array
    """[r, V] int16."""
    direction_steps: Array
    """[1, r] float32, nats per unit of a coordinate."""
    softcap: Array
    """[1, 1] float32, infinite for none: softcap tanh(x / softcap) tends to x."""
    center: Array
    """[1, D] float32, the mean hidden state."""
    projection: Array
    """[r, D] float32."""
    prediction: Array
    """[r + 1, r] float32, of coordinates from the head (`TailBasis.prediction`); all 0 for none."""

    @classmethod
    def quantised(
        cls,
        basis: TailBasis,
        projection: TailProjection,
        offset_step: float,
        direction_steps: float | Sequence[float],
    ) -> StoredBasis:
        """A basis rounded to whole steps, the directions to one step or to one for each.

        Raises ValueError where a direction has more than 32,767 steps, and for NaN.
        """
        own_step = np.full((1, 1), offset_step, np.float32)
        steps = np.broadcast_to(np.asarray(direction_steps, np.float32), (1, basis.rank)).copy()
        offset = np.rint(basis.offset.double().cpu().numpy() / own_step[0])
        directions = np.rint(basis.directions.double().cpu().numpy().T / steps.T)
        if np.isnan(offset).any() or not np.abs(directions).max(initial=0) <= 32767:
            raise ValueError("a direction has more than 32,767 steps, or is no number: use a larger step")
        widest = 2.0**31 - 1  # of padding tokens, which some teachers give an offset of -1e9 or less
        return cls(
            np.clip(offset, -widest, widest).astype(np.int32)[None],
            own_step,
            directions.astype(np.int16),
            steps,
            np.full((1, 1), math.inf if basis.softcap is None else basis.softcap, np.float32),
            projection.center.float().cpu().numpy()[None],
            projection.matrix.float().cpu().numpy(),
            np.zeros((basis.rank + 1, basis.rank), np.float32)
            if basis.prediction is None
            else basis.prediction.float().cpu().numpy(),
        )

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> StoredBasis:
        """The basis of stored arrays. Raises ValueError for arrays that are no basis."""
        stored = cls(**{name: arrays[name] for name in _DTYPES})
        r, v, d = stored.rank, stored.vocab_size, stored.center.shape[-1]
        shapes = {"offset": (1, v), "offset_step": (1, 1), "directions": (r, v), "direction_steps": (1, r)}
        shapes |= {"softcap": (1, 1), "center": (1, d), "projection": (r, d), "prediction": (r + 1, r)}
        for name, dtype in _DTYPES.items():
            if arrays[name].shape != shapes[name] or arrays[name].dtype != np.dtype(dtype):
                raise ValueError(f"its array {name} is {arrays[name].dtype} {arrays[name].shape}")
        return stored

    def arrays(self) -> Arrays:
        """The stored arrays by name."""
        return {name: getattr(self, name) for name in _DTYPES}

    @property
    def vocab_size(self) -> int:
        return int(self.offset.shape[-1])

    @property
    def rank(self) -> int:
        """r, the number of coordinates."""
        return int(self.directions.shape[0])

    @cached_property
    def digest(self) -> str:
        """sha256 of the stored arrays with their names and shapes."""
        sha = hashlib.sha256()
        for name, values in sorted(self.arrays().items()):
            sha.update(f"{name} {list(values.shape)}".encode() + values.astype(_DTYPES[name]).tobytes())
        return sha.hexdigest()

    def basis(self, origin: tuple[Any, tuple[Any, ...]] | None = None) -> TailBasis:
        """The decoded basis."""
        offset = (self.offset[0] * self.offset_step[0].astype(np.float64)).astype(np.float32)
        directions = self.directions * self.direction_steps.T
        softcap = float(self.softcap[0, 0])
        return TailBasis(
            torch.from_numpy(offset),
            torch.from_numpy(directions).T,
            None if math.isinf(softcap) else softcap,
            self.digest,
            origin,
            torch.from_numpy(self.prediction),
        )

    @property
    def to_coordinates(self) -> TailProjection:
        """The map from hidden states to coordinates."""
        return TailProjection(torch.from_numpy(self.center[0]), torch.from_numpy(self.projection))


def publish_basis(cache: Place, stored: StoredBasis) -> None:
    """Write a basis into a cache, unless it is there."""
    publish_learned(CachePaths(cache).basis(stored.digest), stored)


def read_stored_basis(cache: Place, digest: str) -> StoredBasis:
    """The basis of a cache as it is stored, by its digest in the manifest.

    Raises CorruptError naming the folder for a basis that is missing or not as written.
    """
    if not digest.isalnum():  # it becomes a part of a path
        raise CorruptError(f"{cache}: {digest!r} is not the digest of a tail basis: restore or delete the cache")
    return read_learned(CachePaths(cache).basis(digest), digest, "tail basis", StoredBasis.from_arrays)


def read_basis(cache: str, digest: str) -> TailBasis:
    """The decoded basis of the cache at a path or URL: the same object as long as something in this process uses it.

    Targets that a loader's worker sends name it by these arguments. Raises as `read_stored_basis`.
    """
    where = place(cache)
    key = (str(where.absolute() if isinstance(where, Path) else where), digest)
    basis = _known.get(key)
    if basis is None:
        basis = _known[key] = read_stored_basis(where, digest).basis((read_basis, key))
    return basis
