"""The settings of the distillation loss as one object, and the check against targets and student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

from ..recipe.choices import Tail
from ..targets.knots import inverse_temperature
from ..targets.sparse_targets import SparseTargets
from ..targets.whole import WholeTargets
from .divergences import resolve_alpha

TAIL_MODES: tuple[str, ...] = get_args(Tail)


@dataclass(frozen=True)
class LossSettings:
    """Temperature, weights, tail mode and divergence; `loss` holds the formulas."""

    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    tail_mode: str | None = None
    """None: `shape` where the targets have one, else `bucket`."""
    divergence: str = "kl"
    alpha: float | None = None
    """Parameter of the divergence; None is the value of its paper."""

    def __post_init__(self) -> None:
        """Raises ValueError for unknown names, and for settings that exclude each other."""
        resolve_alpha(self.divergence, self.alpha)
        if self.tail_mode is not None and self.tail_mode not in TAIL_MODES:
            raise ValueError(f"unknown tail {self.tail_mode!r}: one of {', '.join(TAIL_MODES)}")
        if self.divergence != "kl" and self.tail_mode not in (None, "shape", "bucket"):
            raise ValueError(
                f"divergence {self.divergence!r} takes the tail as a shape or as a bucket, not as {self.tail_mode!r}"
            )

    def fit(self, targets: SparseTargets | WholeTargets, vocab_size: int) -> LossSettings:
        """These settings with the tail mode that serves these targets.

        Raises ValueError where settings, targets or the student's `vocab_size` do not fit together.
        """
        whole = not isinstance(targets, SparseTargets) or targets.basis is not None
        fitted = self if self.tail_mode is not None else replace(self, tail_mode="shape" if whole else "bucket")
        if vocab_size < targets.vocab_size:
            raise ValueError(
                f"the student has {vocab_size} logits and the teacher {targets.vocab_size}: cached token ids would be out "
                "of range; use the same tokenizer and enlarge the student's output layer"
            )
        if fitted.tail_mode == "shape" and not whole:
            raise ValueError(
                "tail 'shape' needs targets that have one: cache with cache.tail_rank above 0, or use 'bucket'"
            )
        if not isinstance(targets, SparseTargets):
            fitted._check_whole()
            targets.flatten()[:0].dense(fitted.temperature)  # raises for a T that it does not serve
            return fitted
        plain = fitted.tail_mode == "bucket" and fitted.divergence == "kl"
        if targets.draws is not None and fitted.tail_mode != "shape" and not plain:
            raise ValueError(
                f"tail {fitted.tail_mode!r} with divergence {fitted.divergence!r} needs targets without samples of the tail: "
                "use 'bucket' with 'kl'"
            )
        inverse_temperature(fitted.temperature, targets.knots)
        return fitted

    def _check_whole(self) -> None:
        """Raises ValueError for what needs a head, which the mean of several teachers does not have."""
        if self.tail_mode != "shape":
            raise ValueError(
                f"tail {self.tail_mode!r} needs one teacher's targets: the mean of several is a distribution over the whole "
                "vocabulary, use 'shape'"
            )
        if self.divergence == "tail_aware_kl":
            raise ValueError(
                "divergence 'tail_aware_kl' needs one teacher's targets, whose head is in order: choose another"
            )


Weight = float | Callable[[float], float]
"""A weight, or a function of the training's progress from 0 to 1."""


@dataclass(frozen=True)
class ScheduledSettings:
    """Loss settings whose weights may change during a training."""

    settings: LossSettings
    kd_weight: Weight
    ce_weight: Weight

    @property
    def has_weight(self) -> bool:
        """Whether KD or CE can have a weight in any step."""
        return any(callable(weight) or weight > 0 for weight in (self.kd_weight, self.ce_weight))

    def at(self, progress: float) -> LossSettings:
        """The settings at a progress."""
        kd_weight, ce_weight = _value(self.kd_weight, progress), _value(self.ce_weight, progress)
        return replace(self.settings, kd_weight=kd_weight, ce_weight=ce_weight)

    def changing(self, progress: float) -> dict[str, float]:
        """The weights that change, by name."""
        weights = {name: getattr(self, name) for name in ("kd_weight", "ce_weight")}
        return {name: weight(progress) for name, weight in weights.items() if callable(weight)}


def _value(weight: Weight, progress: float) -> float:
    return weight(progress) if callable(weight) else weight
