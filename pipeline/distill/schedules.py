"""Loss weights that change over training."""

from __future__ import annotations

from collections.abc import Callable

from ..recipe.student import Schedule


def weight_at(weight: float | Schedule, progress: float) -> float:
    """A weight at `progress` in [0, 1], the share of the training that is behind.

    A number is constant. "linear" goes straight from `start` to `end`. "wsd", warm-up-stable-decay, goes from `start` to
    `peak` over the first `warmup` share, stays there, and goes to `end` over the last `decay` share (for learning rates Hu et
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
    """A number as it is, a schedule as the function of progress that `DistillationTrainer` takes."""
    return (lambda progress: weight_at(weight, progress)) if isinstance(weight, Schedule) else weight
