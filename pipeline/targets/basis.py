"""The tail's shape: how a target's tail mass is spread over the tokens outside its head.

A teacher's logits are linear in the hidden state h that its output layer reads, so a few coordinates z of h tell the
tail's shape at every temperature. With mu the mean state, P and B the directions kept and W, b the output layer,

    z   = P (h - mu)                        z [r]
    t_v = g(a_v + u_v . z)                  a = W mu + b [V],  U = W B [V, r],  g the architecture's soft-capping
    r_T(v) = exp(beta t_v) / sum_{u in R} exp(beta t_u)                     v in R, beta = 1 / T

A `TailBasis` holds a and U, once for all positions of a cache; a `TailProjection` holds mu and P, which stage one alone
needs. Shapes: [...] any leading axes, V vocabulary, r coordinates, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class TailBasis:
    """The tokens' offsets and directions: what turns the coordinates of a position into logits over the vocabulary."""

    offset: Tensor
    """a [V] float32, nats."""
    directions: Tensor
    """U [V, r] float32, nats per unit of a coordinate; fastest where it is contiguous along V."""
    softcap: float | None = None
    """g(x) = softcap tanh(x / softcap); None: g(x) = x. The scale of the architecture is in a and U."""
    digest: str = ""
    """Names the content; of a basis read from a cache, the digest in its manifest."""
    origin: tuple[Callable[..., TailBasis], tuple[Any, ...]] | None = None
    """A function and its arguments that give this basis in any process, and the same object each time. Pickled in place
    of the tensors, so that the batches of a loader's worker do not carry them."""
    prediction: Tensor | None = None
    """[r + 1, r] float32: z is about (1, mean of the directions of the head's tokens) times it. A cache stores the
    difference."""
    _derived: dict[torch.device | int, TailBasis] = field(init=False, default_factory=dict, repr=False)
    """Copies on other devices and bases of fewer tokens, made once."""

    @property
    def vocab_size(self) -> int:
        return len(self.offset)

    @property
    def rank(self) -> int:
        """r, the number of coordinates."""
        return int(self.directions.shape[1])

    def logits(self, coordinates: Tensor) -> Tensor:
        """Coordinates [..., r] -> t [..., V], the logits of the tail's shape at T = 1, up to a constant."""
        dtype = coordinates.dtype
        logits = linear(coordinates, self.directions.to(dtype), self.offset.to(dtype))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str) -> TailBasis:
        """The basis on a device; it is copied there once, however many targets share it."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.offset.device:
            return self
        if device not in self._derived:
            self._derived[device] = replace(
                self,
                offset=self.offset.to(device),
                directions=self.directions.to(device),
                origin=self._origin_of("to", str(device)),
            )
        return self._derived[device]

    def first(self, vocab_size: int) -> TailBasis:
        """The basis of the first `vocab_size` tokens."""
        if vocab_size >= self.vocab_size:
            return self
        if vocab_size not in self._derived:
            self._derived[vocab_size] = replace(
                self,
                offset=self.offset[:vocab_size],
                directions=self.directions[:vocab_size],
                digest=self.digest and f"{self.digest}[:{vocab_size}]",
                origin=self._origin_of("first", vocab_size),
            )
        return self._derived[vocab_size]

    def _origin_of(self, method: str, argument: Any) -> tuple[Callable[..., TailBasis], tuple[Any, ...]] | None:
        return None if self.origin is None else (_derive, (self.origin, method, argument))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is not None:
            return self.origin
        return TailBasis, (self.offset, self.directions, self.softcap, self.digest, None, self.prediction)


def same_basis(one: TailBasis | None, other: TailBasis | None) -> bool:
    """Whether coordinates in one are coordinates in the other."""
    return one is other or (one is not None and other is not None and one.digest == other.digest != "")


def _derive(origin: tuple[Callable[..., TailBasis], tuple[Any, ...]], method: str, argument: Any) -> TailBasis:
    function, arguments = origin
    derived: TailBasis = getattr(function(*arguments), method)(argument)
    return derived


@dataclass(frozen=True, eq=False)
class TailProjection:
    """The linear map from the teacher's hidden states to coordinates."""

    center: Tensor
    """mu [D] float32."""
    matrix: Tensor
    """P [r, D] float32."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TailProjection:
        return TailProjection(self.center.to(device, dtype), self.matrix.to(device, dtype))

    def coordinates(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] that the output layer reads -> z [..., r], in the dtype of the projection."""
        return (hidden.to(self.matrix.dtype) - self.center) @ self.matrix.T
