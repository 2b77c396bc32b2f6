"""The tail's shape: how a target's tail mass is spread over the tokens outside its head.

A teacher's logits are linear in the hidden state h that its output layer reads, so a few coordinates z of h tell the
tail's shape at every temperature. With mu the mean state, B the directions kept and W, b the output layer,

    h'  = mu + B z                          z [r]
    t_v = g(a_v + u_v . z)                  a = W mu + b [V],  U = W B [V, r],  g the architecture's soft-capping
    r_T(v) = exp(beta t_v) / sum_{u in R} exp(beta t_u)                     v in R, beta = 1 / T

A `TailBasis` holds a and U, once for all positions of a cache. Shapes: N positions, V vocabulary, r coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TailBasis:
    """The tokens' offsets and directions: what turns the coordinates of a position into logits over the vocabulary."""

    offset: Tensor
    """a [V] float32, nats."""
    directions: Tensor
    """U [V, r] float32, nats per unit of a coordinate."""
    softcap: float | None = None
    """g(x) = softcap tanh(x / softcap); None: g(x) = x. The scale of the architecture is in a and U."""
    digest: str = ""
    """Names the content; of a basis read from a cache, the digest in its manifest."""
    origin: tuple[Callable[..., TailBasis], tuple[Any, ...]] | None = None
    """A function and its arguments that give this basis in any process. Pickled in place of the tensors, so that the
    batches of a loader's worker do not carry them."""
    _moved: dict[torch.device, TailBasis] = field(default_factory=dict, repr=False)
    """Copies on other devices, made once."""

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
        logits = coordinates @ self.directions.to(dtype).T + self.offset.to(dtype)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str) -> TailBasis:
        """The basis on a device; it is copied there once, however many targets share it."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.offset.device:
            return self
        if device not in self._moved:
            self._moved[device] = replace(
                self, offset=self.offset.to(device), directions=self.directions.to(device), _moved={}
            )
        return self._moved[device]

    def first(self, vocab_size: int) -> TailBasis:
        """The basis of the first `vocab_size` tokens."""
        if vocab_size >= self.vocab_size:
            return self
        return replace(
            self,
            offset=self.offset[:vocab_size],
            directions=self.directions[:vocab_size],
            digest=f"{self.digest}[:{vocab_size}]",
            origin=None if self.origin is None else (_first, (self.origin, vocab_size)),
            _moved={},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is not None:
            return self.origin
        return TailBasis, (self.offset, self.directions, self.softcap, self.digest)


def _first(origin: tuple[Callable[..., TailBasis], tuple[Any, ...]], vocab_size: int) -> TailBasis:
    function, arguments = origin
    return function(*arguments).first(vocab_size)
