"""From targets to small integers and back: the lossy step, and the only one.

Stored per position, each as one Zarr array with leading axes [row, position]:

    token_ids        [K] uint16 or uint32, most probable first
    log_prob_steps   [K] uint16, log-probabilities in steps of -`log_prob_step` nats: the first, then differences along rank
    tail_steps       [C] int16, the tail curve in steps of `tail_step` nats; -32768 where nothing is left out

An error e_v in log p_v costs about 1/2 sum p_v e_v^2 of KL; rounding to steps of 1/12 nat makes that 1/24/144 = 2.9e-4.
The head's mass is then set right by the tail's, which is kept in finer steps: one likely token rounded by 1/24 nat would
otherwise move as much as 1 % of the probability between head and tail.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.targets import SparseTargets

_EMPTY_TAIL = -32768
_MAX_STEPS = 65535
_NEARLY_ALL = -0.03  # log of a tail mass of 97 %

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class TargetCodec:
    """How targets of one cache are stored; its fields are recorded in the manifest and belong to the identity."""

    k: int
    knots: tuple[float, ...]
    vocab_size: int
    log_prob_step: float = 1 / 12
    tail_step: float = 1 / 512

    def to_json(self) -> dict[str, Any]:
        return {"name": "steps", "version": 1, **asdict(self), "knots": list(self.knots)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TargetCodec:
        """Raises ValueError for a codec this version does not know."""
        fields = dict(value)
        if (fields.pop("name", None), fields.pop("version", None)) != ("steps", 1):
            raise ValueError(f"unknown target codec {value.get('name')!r} version {value.get('version')!r}")
        fields["knots"] = tuple(fields["knots"])
        return cls(**fields)

    def layout(self) -> dict[str, tuple[str, int]]:
        """Name -> (dtype, entries per position) of every stored array."""
        return {
            "token_ids": ("uint16" if self.vocab_size <= 2**16 else "uint32", self.k),
            "log_prob_steps": ("uint16", self.k),
            "tail_steps": ("int16", len(self.knots)),
        }

    def encode(self, targets: SparseTargets) -> Arrays:
        """Targets [R, L] -> arrays [R, L, ...]; positions without a target become zeros."""
        if (targets.token_ids.shape[-1], targets.knots, targets.vocab_size) != (self.k, self.knots, self.vocab_size):
            raise ValueError(f"targets of another kind than {self}")
        mask = targets.mask.unsqueeze(-1)
        log_probs = torch.where(mask, targets.log_probs, 0.0)
        steps = (log_probs / -self.log_prob_step).round().clamp(0, _MAX_STEPS).to(torch.int32)
        steps = torch.diff(steps, dim=-1, prepend=torch.zeros_like(steps[..., :1]))
        tail = torch.where(mask, targets.tail_curve, 0.0)
        tail_steps = (tail / self.tail_step).round().clamp(_EMPTY_TAIL + 1, -_EMPTY_TAIL - 1)
        tail_steps = torch.where(torch.isneginf(tail), float(_EMPTY_TAIL), tail_steps)
        values = {
            "token_ids": torch.where(mask, targets.token_ids, 0),
            "log_prob_steps": steps,
            "tail_steps": tail_steps,
        }
        return {name: values[name].cpu().numpy().astype(dtype) for name, (dtype, _) in self.layout().items()}

    def decode(self, arrays: Arrays, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> SparseTargets:
        """Arrays [R, L, ...] and the positions with a target [R, L] -> targets [R, L]."""
        used = torch.from_numpy(mask)
        token_ids = torch.from_numpy(arrays["token_ids"].astype(np.int64))
        steps = np.cumsum(arrays["log_prob_steps"], axis=-1, dtype=np.int32)
        log_probs = torch.from_numpy(steps).to(torch.float32).mul_(-self.log_prob_step)
        tail_steps = torch.from_numpy(arrays["tail_steps"].astype(np.float32))
        tail_curve = torch.where(tail_steps == _EMPTY_TAIL, -torch.inf, tail_steps * self.tail_step)
        log_probs += self._mass_correction(log_probs, tail_curve).unsqueeze(-1)
        if not mask.all():
            token_ids[~used] = -1
            log_probs[~used] = -torch.inf
            tail_curve[~used] = -torch.inf
        return SparseTargets(token_ids, log_probs, tail_curve, used, self.knots, self.vocab_size)

    def _mass_correction(self, log_probs: torch.Tensor, tail_curve: torch.Tensor) -> torch.Tensor:
        """What to add to the head's log-probabilities [R, L] so that head and tail sum to 1 at T = 1.

        Zero where the tail holds nearly everything: there 1 - tail says less about the head than the head itself.
        """
        log_tail = tail_curve[..., self.knots.index(1.0)]
        wanted = torch.log(-torch.expm1(log_tail.clamp(max=_NEARLY_ALL)))
        return torch.where(log_tail < _NEARLY_ALL, wanted - torch.logsumexp(log_probs, -1), 0.0)
