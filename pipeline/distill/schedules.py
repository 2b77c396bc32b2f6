"""Loss weights that change over training."""

from __future__ import annotations

from collections.abc import Callable

from ..recipe.student import Schedule


def weight_at(weight: float | Schedule, progress: float) -> float:
    """A weight at `progress` in [0, 1], the completed share of the training.

    A number is constant. "linear" interpolates from `start` to `end`. "wsd", warm-up-stable-decay, rises from `start` to
    `peak` over the first `warmup` share, stays there, and moves to `end` over the last `decay` share (for learning rates Hu et
    al. 2024, arXiv 2404.06395, section 4; for the weight of a distillation loss Peng et al. 2024, arXiv 2410.16215).
    """
    if not isinstance(weight, Schedule):
        return weight
    if weight.shape == "linear":
        return weight.start + (weight.end - weight.start) * progress
    if progress < weight.warmup:
        return weight.start + (weight.peak - weight.start) * progress / weight.warmup
    if progress > 1 - weight.decay:
        return weight.end + (weight.peak - weight.end) * (1 - progress) / weight.decay
    return weight.peak


def as_function(weight: float | Schedule) -> float | Callable[[float], float]:
    """A number unchanged, a schedule as a function of progress: the weights of `DistillationTrainer`."""
    return (lambda progress: weight_at(weight, progress)) if isinstance(weight, Schedule) else weight
