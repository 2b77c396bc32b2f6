"""The settings of the distillation loss as one object, and the check against targets and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..recipe.choices import Tail
from ..targets.knots import inverse_temperature
from ..targets.sparse_targets import SparseTargets
from .divergences import resolve_alpha

TAIL_MODES: tuple[str, ...] = get_args(Tail)


@dataclass(frozen=True)
class LossSettings:
    """Temperature, weights, tail mode and divergence; `loss` holds the formulas."""

    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    tail_mode: str = "bucket"
    divergence: str = "kl"
    alpha: float | None = None
    """Parameter of the divergence; None is the value of its paper."""

    def __post_init__(self) -> None:
        """Raises ValueError for unknown names, and for settings that exclude each other."""
        resolve_alpha(self.divergence, self.alpha)
        if self.tail_mode not in TAIL_MODES:
            raise ValueError(f"unknown tail {self.tail_mode!r}: one of {', '.join(TAIL_MODES)}")
        if self.divergence != "kl" and self.tail_mode != "bucket":
            raise ValueError(f"divergence {self.divergence!r} takes the tail as a bucket, not as {self.tail_mode!r}")

    def check(self, targets: SparseTargets, vocab_size: int) -> None:
        """Raises ValueError where settings, targets or the student's `vocab_size` do not fit together."""
        if targets.draws is not None and (self.tail_mode != "bucket" or self.divergence != "kl"):
            raise ValueError(
                f"tail {self.tail_mode!r} with divergence {self.divergence!r} needs targets without samples of the tail: "
                "use 'bucket' with 'kl'"
            )
        if vocab_size < targets.vocab_size:
            raise ValueError(
                f"the student has {vocab_size} logits and the teacher {targets.vocab_size}: cached token ids would be out "
                "of range; use the same tokenizer and enlarge the student's output layer"
            )
        inverse_temperature(self.temperature, targets.knots)
